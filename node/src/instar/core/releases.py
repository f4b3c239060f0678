"""What a release is called. A release is known by its program digest; its version is for people and order."""

from __future__ import annotations

import re
from dataclasses import dataclass

from instar.core.errors import InputError

_VERSION = re.compile(r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})(?:-([0-9a-z]{1,20}))?")
_DIGEST = re.compile(r"[0-9a-f]{96}")
_NAME = re.compile(_VERSION.pattern + r"-[0-9a-f]{12}")


def version_key(version: str) -> tuple[int, int, int, bool, str]:
    """An order for versions `1.2.3` and `1.2.3-rc1` (which comes before `1.2.3`).

    Raises InputError `bad-version`.
    """
    match = _VERSION.fullmatch(version)
    if match is None:
        raise InputError("bad-version", f"cannot read version: expected N.N.N or N.N.N-word, got {version!r}")
    major, minor, patch, pre = match.groups()
    return int(major), int(minor), int(patch), pre is None, pre or ""


@dataclass(frozen=True, slots=True)
class Release:
    """One build: `version`, and `digest`, the SHA-384 of its program (96 hexadecimal digits)."""

    version: str
    digest: str

    def __post_init__(self) -> None:
        version_key(self.version)
        if not _DIGEST.fullmatch(self.digest):
            raise InputError(
                "bad-digest", f"cannot read digest: expected 96 hex digits, got {self.digest[:100]!r}"
            )

    @property
    def name(self) -> str:
        """The folder's name: version and the first 12 digits of the digest."""
        return f"{self.version}-{self.digest[:12]}"


def is_release_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def version_of(name: str) -> str:
    """The version in a release folder's name."""
    return name.rpartition("-")[0]
