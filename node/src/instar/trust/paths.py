"""Names inside archives, manifests and repositories: relative, plain, one way to write each."""

from __future__ import annotations

from instar.core.errors import InputError

MAX_PATH = 512  # bytes


def check_path(path: str, what: str) -> str:
    """`path` itself when it is safe below any folder.

    Raises InputError `bad-path` for an absolute path, '..', '.', an empty part, a backslash, a control
    character, a drive letter's colon, or more than MAX_PATH bytes.
    """
    reason = _fault(path)
    if reason:
        raise InputError("bad-path", f"cannot use the {what} path {path[:80]!r}: {reason}")
    return path


def _fault(path: str) -> str:
    if not path:
        return "it is empty"
    try:
        size = len(path.encode("utf-8"))
    except UnicodeEncodeError:
        return "it is not valid UTF-8"
    if size > MAX_PATH:
        return f"expected at most {MAX_PATH} bytes, got {size}"
    if path.startswith("/"):
        return "it is absolute"
    if any(character in path for character in "\\:") or any(ord(c) < 32 or ord(c) == 127 for c in path):
        return "it holds a backslash, a colon or a control character"
    parts = path.split("/")
    if ".." in parts:
        return "it leads out by '..'"
    if "" in parts or "." in parts:
        return "it has an empty part or '.'"
    return ""
