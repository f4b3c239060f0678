"""Short files of /proc, /sys and /etc; what cannot be read is absent, never an error."""

from __future__ import annotations

import os


def text(path: str, most: int = 1 << 20) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(most).decode("utf-8", "backslashreplace")
    except OSError:
        return ""


def line(path: str) -> str:
    """The first line, without blanks around it."""
    return text(path, 4096).partition("\n")[0].strip("\0 \t\r")


def number(path: str, otherwise: int = 0) -> int:
    try:
        return int(line(path))
    except ValueError:
        return otherwise


def names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def pairs(content: str, separator: str) -> dict[str, str]:
    """`key<separator>value` lines; of several with one key the first counts."""
    found: dict[str, str] = {}
    for one in content.splitlines():
        key, mark, value = one.partition(separator)
        if mark:
            found.setdefault(key.strip(), value.strip())
    return found
