"""Durable files of the repository: wholly there after a power cut, or not at all.

The order that must hold: temporary file in the same folder, write, fsync, rename, fsync of the
folder. `Disk` is the set of calls whose order decides; tests hand in one that stops at a chosen call.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from instar.core.errors import MachineError


class Disk:
    """The calls on the file system. Stateless."""

    def write_new(self, path: Path, data: bytes, mode: int) -> None:
        """Make `path` anew with `data`; the data is on the disk when this returns, the name may not be."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
            file.flush()
            os.fsync(fd)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def link(self, old: Path, new: Path) -> None:
        """A second name for the same file; where the file system has no links, a copy made durable."""
        try:
            os.link(old, new)
        except PermissionError:
            shutil.copyfile(old, new)
            self.sync(new)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path, 0o755)

    def sync(self, path: Path) -> None:
        """fsync of a file or folder."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


DISK = Disk()


def write_atomic(path: Path, data: bytes, mode: int = 0o644, disk: Disk = DISK) -> None:
    """Replace `path` by `data`. Raises MachineError (`disk-full`, `disk-failed`); the old file then stays."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        disk.write_new(temporary, data, mode)
        disk.rename(temporary, path)
        disk.sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            disk.unlink(temporary)
        raise failed("write", path, error) from error


def make_folder(path: Path, disk: Disk = DISK) -> None:
    """Make `path` and its missing parents, each name synced. Present is fine."""
    if path.is_dir():
        return
    make_folder(path.parent, disk)
    try:
        with contextlib.suppress(FileExistsError):
            disk.mkdir(path)
        disk.sync(path.parent)
    except OSError as error:
        raise failed("make", path, error) from error


def failed(verb: str, path: Path, error: OSError) -> MachineError:
    """The MachineError that tells what an OSError about `path` means."""
    import errno

    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = error.strerror or str(error)
    return MachineError("disk-full" if full else "disk-failed", f"cannot {verb} {path}: {reason}")
