"""What a release is called. A release is known by its program digest; its version is for people and order.

Read letter by letter: the patterns that would say the same cost the launcher a millisecond to compile.
"""

from __future__ import annotations

from instar.core.errors import InputError
from instar.core.light import dataclass

NUMBER = 9  # digits of one part of a version, at most
WORD = 20  # letters of the word behind it, at most
DIGEST = 96
PREFIX = 12  # digits of the digest in a release's name
_HEX = frozenset("0123456789abcdef")
_LETTERS = frozenset("0123456789abcdefghijklmnopqrstuvwxyz")


def version_key(version: str) -> tuple[int, int, int, bool, str]:
    """An order for versions `1.2.3` and `1.2.3-rc1` (which comes before `1.2.3`).

    Raises InputError `bad-version`.
    """
    if not _is_version(version):
        raise InputError("bad-version", f"cannot read version: expected N.N.N or N.N.N-word, got {version!r}")
    numbers, _, pre = version.partition("-")
    major, minor, patch = numbers.split(".")
    return int(major), int(minor), int(patch), not pre, pre


@dataclass(frozen=True, slots=True)
class Release:
    """One build: `version`, and `digest`, the SHA-384 of its program (96 hexadecimal digits)."""

    version: str
    digest: str

    def __post_init__(self) -> None:
        version_key(self.version)
        if not _is_hex(self.digest, DIGEST):
            raise InputError(
                "bad-digest", f"cannot read digest: expected 96 hex digits, got {self.digest[:100]!r}"
            )

    @property
    def name(self) -> str:
        """The folder's name: version and the first 12 digits of the digest."""
        return f"{self.version}-{self.digest[:PREFIX]}"


def is_release_name(name: str) -> bool:
    version, dash, digest = name.rpartition("-")
    return bool(dash) and _is_version(version) and _is_hex(digest, PREFIX)


def version_of(name: str) -> str:
    """The version in a release folder's name."""
    return name.rpartition("-")[0]


def _is_version(text: str) -> bool:
    numbers, dash, word = text.partition("-")
    parts = numbers.split(".")
    if len(parts) != 3 or not all(_is_number(part) for part in parts):
        return False
    return not dash or (0 < len(word) <= WORD and _LETTERS.issuperset(word))


def _is_number(text: str) -> bool:
    small = 0 < len(text) <= NUMBER and text.isascii() and text.isdigit()
    return small and (text == "0" or text[0] != "0")


def _is_hex(text: str, digits: int) -> bool:
    return len(text) == digits and _HEX.issuperset(text)
