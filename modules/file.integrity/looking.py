"""Looking at one file: what it is, and the digest of its bytes in slices that are bounded.

No symbolic link is followed, and nothing is opened but regular files, without waiting and without a trace
in their time of access where that is allowed.
"""

from __future__ import annotations

import hashlib
import os
import stat
from typing import Any, NamedTuple

CHUNK = 128 << 10  # bytes of one read
LARGEST = 1 << 30  # bytes; of a larger file only the rest is looked at
KINDS = {
    stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link", stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device",
}  # fmt: skip


class Look(NamedTuple):
    """What is kept of a path. `content` is the SHA-256 of a file, where a link points, '' for anything else."""

    kind: str
    size: int
    mode: int
    uid: int
    gid: int
    mtime: int  # nanoseconds, as ctime
    ctime: int
    dev: int
    ino: int
    content: str = ""

    def same_file(self, other: Look) -> bool:
        return (self.dev, self.ino) == (other.dev, other.ino)

    def untouched(self, other: Look) -> bool:
        """Nothing that the kernel keeps about it says that it changed."""
        return self[:9] == other[:9]

    def shown(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "kind": self.kind,
            "size": self.size,
            "mode": f"{self.mode:04o}",
            "owner": f"{self.uid}:{self.gid}",
            "mtime": self.mtime / 1e9,
        }
        if self.kind == "link":
            found["target"] = self.content
        elif self.kind == "file":
            found["sha256"] = self.content
        return found


def of(seen: os.stat_result) -> Look:
    """Without the content. A folder's size and times change with what is in it: they are not its own."""
    kind = KINDS.get(stat.S_IFMT(seen.st_mode), "device")
    folder = kind == "folder"
    return Look(
        kind,
        0 if folder else seen.st_size,
        stat.S_IMODE(seen.st_mode),
        seen.st_uid,
        seen.st_gid,
        0 if folder else seen.st_mtime_ns,
        0 if folder else seen.st_ctime_ns,
        seen.st_dev,
        seen.st_ino,
    )


def differences(before: Look, after: Look) -> list[str]:
    """What changed, in words; [] when nothing did that counts."""
    if before.kind != after.kind:
        return ["type"]
    words = [name for name in ("content", "size", "mode") if getattr(before, name) != getattr(after, name)]
    if (before.uid, before.gid) != (after.uid, after.gid):
        words.append("owner")
    if before.mtime != after.mtime:
        words.append("mtime")
    if not before.same_file(after):
        words.append("replaced")
    return words


class Reading:
    """A file that is being hashed. A context of its own between steps: `more` until it gives a Look."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        try:
            self._fd = os.open(path, flags | os.O_NOATIME)
        except PermissionError:
            self._fd = os.open(path, flags)  # only the owner may leave the time of access alone
        self.path = path
        self._digest = hashlib.sha256()
        self._before = of(os.fstat(self._fd))

    def more(self, room: int) -> tuple[Look | None, int, bool]:
        """Read up to `room` bytes: (the look when it is done, bytes read, whether the file stood still).

        Raises OSError.
        """
        if self._before.kind != "file" or self._before.size > LARGEST:
            return self._before, 0, True
        done = 0
        while done < room:
            data = os.read(self._fd, min(CHUNK, room - done))
            if not data:
                after = of(os.fstat(self._fd))
                return after._replace(content=self._digest.hexdigest()), done, after.untouched(self._before)
            self._digest.update(data)
            done += len(data)
        return None, done, True

    def close(self) -> None:
        os.close(self._fd)
