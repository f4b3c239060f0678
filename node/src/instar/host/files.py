"""Durable files: what is written here is either wholly there after a power cut, or not at all.

The order that must hold: temporary file in the same folder, write, fsync, rename, fsync of the
folder. `Disk` is the set of calls that this needs; tests hand in one that loses or tears
whatever was not synced.

Standard library only, few imports: the launcher uses this.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from instar.core.errors import MachineError


class Disk:
    """The calls on the file system whose order decides what survives. Stateless."""

    def write_new(self, path: Path, data: bytes, mode: int) -> None:
        """Make `path` anew with `data`; the data is on the disk when this returns, the name may not be."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            os.fchmod(fd, mode)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    def append(self, path: Path, data: bytes, mode: int) -> None:
        """Add `data` at the end of `path` (made if absent) and sync it."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    def write_over(self, path: Path, data: bytes, offset: int) -> None:
        """Put `data` into `path` at `offset`, within what the file holds already, and sync it."""
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            view = memoryview(data)
            while view:
                done = os.pwrite(fd, view, offset)
                view, offset = view[done:], offset + done
            os.fdatasync(fd)
        finally:
            os.close(fd)

    def create(self, path: Path, mode: int) -> int:
        """Make `path` anew, empty, to be filled by `write_at`. The descriptor; nothing is synced."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def write_at(self, fd: int, data: bytes, offset: int) -> None:
        """All of `data` into an open file or device at `offset`; not synced."""
        view = memoryview(data)
        while view:
            done = os.pwrite(fd, view, offset)
            view, offset = view[done:], offset + done

    def sync_open(self, fd: int) -> None:
        """All that was written to this open file or device is on the disk when this returns, its size too, but not
        its times: a file's other blocks need no journal for that."""
        os.fdatasync(fd)

    def write_variable(self, path: Path, data: bytes) -> None:
        """Give a file of efivarfs its whole content by one call, as the firmware wants it: there when this
        returns, and never in part."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, data)
            with contextlib.suppress(OSError):  # for a plain folder; efivarfs has no such call
                os.ftruncate(fd, len(data))
                os.fsync(fd)
        finally:
            os.close(fd)

    def truncate(self, path: Path, size: int) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.ftruncate(fd, size)
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def symlink(self, target: str, path: Path) -> None:
        os.symlink(target, path)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def mkdir(self, path: Path, mode: int) -> None:
        os.mkdir(path, mode)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and all below it, without following links; nothing is synced."""
        import shutil  # brings the compressors with it, which a resident must not carry

        shutil.rmtree(path)

    def sync_folder(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def sync_file(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


DISK = Disk()


def write_atomic(path: Path, data: bytes, mode: int = 0o644, disk: Disk = DISK) -> None:
    """Replace `path` by `data`: a reader, or a power cut, sees the old bytes or the new ones.

    Raises MachineError (`disk-full`, `disk-failed`) and leaves the old file alone.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        disk.write_new(temporary, data, mode)
        disk.rename(temporary, path)
        disk.sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            disk.unlink(temporary)
        raise failed("write", path, error) from error


def point_link(link: Path, target: str, disk: Disk = DISK) -> None:
    """Make the symbolic link `link` say `target`, by one rename; the folder is synced."""
    temporary = link.with_name(f".{link.name}.new")
    try:
        with contextlib.suppress(FileNotFoundError):
            disk.unlink(temporary)
        disk.symlink(target, temporary)
        disk.rename(temporary, link)
        disk.sync_folder(link.parent)
    except OSError as error:
        raise failed("point", link, error) from error


def remove(path: Path, disk: Disk = DISK) -> None:
    """Remove a file, durably. Absent is fine."""
    try:
        disk.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise failed("remove", path, error) from error
    disk.sync_folder(path.parent)


def remove_tree(path: Path, disk: Disk = DISK) -> None:
    """Remove a folder and all below it without following links. Absent is fine."""
    try:
        disk.remove_tree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise failed("remove", path, error) from error


def make_folder(path: Path, mode: int = 0o755, disk: Disk = DISK) -> None:
    """Make `path` and its missing parents; each new name is synced."""
    if path.is_dir():
        return
    make_folder(path.parent, 0o755, disk)
    try:
        with contextlib.suppress(FileExistsError):
            disk.mkdir(path, mode)
        disk.sync_folder(path.parent)
    except OSError as error:
        raise failed("make", path, error) from error


def failed(verb: str, path: Path, error: OSError) -> MachineError:
    """The MachineError that tells what an OSError about `path` means."""
    import errno

    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    code = "disk-full" if full else "disk-failed"
    return MachineError(code, f"cannot {verb} {path}: {os.strerror(error.errno or 0)}")
