"""Paths as texts that can be kept, shown and read back, whatever bytes a file's name has."""

from __future__ import annotations

import os
import re

MOST_LENGTH = 1024  # of a path to watch
_ESCAPE = re.compile(rb"\\(\\|x[0-9a-f]{2})")


def spell(path: str) -> str:
    r"""A path for people and for JSON: bytes that are no UTF-8 become \xNN, and a backslash is doubled.

    >>> spell(os.fsdecode(b'/a\\b\xff'))
    '/a\\\\b\\xff'
    """
    if path.isascii() and "\\" not in path:
        return path
    raw = os.fsencode(path).replace(b"\\", b"\\\\")
    return raw.decode("utf-8", "backslashreplace")


def unspell(text: str) -> str:
    """The path that was spelled so. `spell(unspell(text)) == text` for what `spell` made."""
    if "\\" not in text:
        return text
    raw = _ESCAPE.sub(_byte, text.encode("utf-8", "surrogateescape"))
    return os.fsdecode(raw)


def _byte(match: re.Match[bytes]) -> bytes:
    code = match[1]
    return code if code == b"\\" else bytes((int(code[1:], 16),))


def below(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies below it."""
    return path == folder or folder == "/" or path.startswith(folder + "/")


def checked(value: object, most: int) -> list[str]:
    """The paths of a `watch`: absolute, plain, none below another. Raises ValueError."""
    if not isinstance(value, list) or not 0 < len(value) <= most:
        raise ValueError(f"cannot watch: expected 1 to {most} absolute paths as 'paths', got {value!a:.80}")
    found = set()
    for one in value:
        if not isinstance(one, str) or not one.startswith("/") or "\0" in one or len(one) > MOST_LENGTH:
            raise ValueError(f"cannot watch: expected an absolute path, got {one!a:.80}")
        if ".." in one.split("/"):
            raise ValueError(f"cannot watch: expected a path without '..', got {one!a:.80}")
        found.add(os.path.normpath(unspell(one)).replace("//", "/"))
    return [path for path in sorted(found) if not any(below(path, other) for other in found - {path})]
