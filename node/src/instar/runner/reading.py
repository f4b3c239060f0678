"""Files that a module may read through its host: those that `touches.read` names, what lies below them, and its
own data. A link is followed, and what it leads to must lie there too."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from instar.runner.wrong import ABSENT, BAD_VALUE, FAILED, REFUSED, TOO_LARGE, Wrong

MOST_NAMES = 20_000  # of one folder
FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # a pipe or a device must not hold us
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


class Reading:
    """`allowed` are absolute paths of files and folders; a link among them stands for what it leads to."""

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self._allowed = [os.path.realpath(path) for path in allowed]

    def read(self, path: bytes, offset: int, room: int) -> bytes:
        """Up to `room` bytes, b'' at the end. Raises Wrong ABSENT, REFUSED, FAILED, BAD_VALUE."""
        if offset < 0:
            raise Wrong(
                BAD_VALUE, "module-failed", f"cannot read a file: expected offset 0 or more, got {offset}"
            )
        fd = self._open(path, stat.S_ISREG)
        try:
            return _whole(fd, offset, room)
        except OSError as error:
            raise Wrong(FAILED) from error
        finally:
            os.close(fd)

    def list(self, path: bytes) -> list[dict[str, Any]]:
        """What is in a folder, by name. Raises Wrong ABSENT, REFUSED, FAILED, TOO_LARGE."""
        fd = self._open(path, stat.S_ISDIR)
        try:
            names = sorted(os.listdir(fd))
            if len(names) > MOST_NAMES:
                text = f"cannot list a folder: expected at most {MOST_NAMES} names, got {len(names)}"
                raise Wrong(TOO_LARGE, "module-failed", text)
            return [entry for name in names if (entry := _entry(fd, name))]
        except OSError as error:
            raise Wrong(FAILED) from error
        finally:
            os.close(fd)

    def _open(self, path: bytes, kind: Any) -> int:
        """Raises Wrong. What was opened is looked at, and not only its name: names can change meanwhile."""
        name = os.fsdecode(path)
        if not name.startswith("/") or "\0" in name:
            raise Wrong(REFUSED)
        if not self._inside(os.path.realpath(name)):
            raise Wrong(REFUSED)
        try:
            fd = os.open(name, FLAGS)  # as it was given: another user has only the way through /proc/self/fd
        except OSError as error:
            raise Wrong(ABSENT if error.errno in NOT_THERE else FAILED) from error
        try:
            if not self._inside(os.readlink(f"/proc/self/fd/{fd}")):
                raise Wrong(REFUSED)
            if not kind(os.fstat(fd).st_mode):
                raise Wrong(FAILED)
        except OSError as error:
            os.close(fd)
            raise Wrong(FAILED) from error
        except Wrong:
            os.close(fd)
            raise
        return fd

    def _inside(self, real: str) -> bool:
        return any(real == path or real.startswith(path.rstrip("/") + "/") for path in self._allowed)


def _whole(fd: int, offset: int, room: int) -> bytes:
    """Files below /proc give a piece at a time."""
    found = b""
    while len(found) < room:
        chunk = os.pread(fd, min(room - len(found), 1 << 20), offset + len(found))
        if not chunk:
            break
        found += chunk
    return found


def _entry(folder: int, name: str) -> dict[str, Any]:
    try:
        found = os.lstat(name, dir_fd=folder)
    except OSError:
        return {}  # gone meanwhile
    mode = found.st_mode
    kind = "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"
    return {
        "name": os.fsencode(name).decode("utf-8", "replace"),
        "kind": "link" if stat.S_ISLNK(mode) else kind,
        "size": found.st_size,
        "mode": stat.S_IMODE(mode),
        "mtime": found.st_mtime,
    }
