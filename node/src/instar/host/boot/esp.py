"""The EFI system partition: kernel images put there so that a power cut leaves them whole or absent.

On vfat (seen with Linux 6.1) fsync of a file, rename, and fsync of the folder leave an entry of 0 bytes on the
disk: the *renamed* file must be opened again and synced, then its folder. The file system is never mounted
synchronous: an installation took ten times as long.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from instar.core.errors import MachineError
from instar.host.files import DISK, Disk, failed, make_folder
from instar.host.points import reach

CHUNK = 1 << 20
RESERVE = 1 << 20  # bytes left free for folders and the firmware's own files
IMAGES_AT_ONCE = 3  # both slots' and a temporary one


def check_room(esp: Path, image: int) -> None:
    """See that both slots' images of `image` bytes and a temporary one fit, what is there already counted.

    Raises MachineError `esp-full` before anything is written.
    """
    try:
        found = os.statvfs(esp)
    except OSError as error:
        raise failed("look at", esp, error) from error
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    needed = IMAGES_AT_ONCE * image + RESERVE
    if total < needed:
        text = f"cannot install: expected an EFI system partition of {needed} bytes at least, got {total}"
        raise MachineError("esp-full", text)
    if free < image + RESERVE:
        text = f"cannot install: expected {image + RESERVE} free bytes in {esp}, got {free}"
        raise MachineError("esp-full", text)


def place(source: BinaryIO, size: int, sha256: str, path: Path, disk: Disk = DISK) -> None:
    """Make `path` from `size` bytes of `source`, read back with the page cache dropped. Replaces what was there.

    Raises MachineError `esp-full`, `disk-failed`, `not-as-written`; the old file is then still whole.
    """
    make_folder(path.parent, 0o755, disk)
    temporary = path.with_name(f"{path.name}.new")
    try:
        _copy(source, size, temporary)
        reach("esp:written")
        check_file(temporary, size, sha256)
        disk.rename(temporary, path)
        reach("esp:renamed")
        disk.sync_file(path)
        disk.sync_folder(path.parent)
    except OSError as error:
        _sweep(temporary, disk)
        raise _full(path, error) from error
    except MachineError:
        _sweep(temporary, disk)
        raise
    check_file(path, size, sha256)


def write_small(path: Path, data: bytes, disk: Disk = DISK) -> bool:
    """A small file (a loader's settings), by the same order; False when it held `data` already."""
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == data:
            return False
    make_folder(path.parent, 0o755, disk)
    temporary = path.with_name(f"{path.name}.new")
    try:
        disk.write_new(temporary, data, 0o644)
        disk.rename(temporary, path)
        disk.sync_file(path)
        disk.sync_folder(path.parent)
    except OSError as error:
        _sweep(temporary, disk)
        raise _full(path, error) from error
    return True


def remove(path: Path, disk: Disk = DISK) -> None:
    """Remove an image, durably: what is about to be overwritten must not be bootable by name. Absent is fine."""
    try:
        disk.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise failed("remove", path, error) from error
    disk.sync_folder(path.parent)


def rename(old: Path, new: Path, disk: Disk = DISK) -> None:
    """Give a file another name, durably."""
    try:
        disk.rename(old, new)
        disk.sync_file(new)
        disk.sync_folder(new.parent)
    except OSError as error:
        raise failed("rename", old, error) from error


def check_file(path: Path, size: int, sha256: str, progress: Callable[[int], None] = lambda _: None) -> None:
    """Read a file from the disk itself and compare. Raises MachineError `not-as-written`, `disk-failed`."""
    try:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = digest(file, size, progress)
            longer = file.read(1)
    except OSError as error:
        raise failed("read", path, error) from error
    if found != sha256 or longer:
        text = f"cannot trust {path}: expected SHA-256 {sha256} of {size} bytes, got {found}"
        raise MachineError("not-as-written", text)


def digest(file: BinaryIO, size: int, progress: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of the next `size` bytes, or of what there is of them."""
    hashed, left = hashlib.sha256(), size
    buffer = memoryview(bytearray(CHUNK))
    while left > 0:
        count = file.readinto(buffer[: min(CHUNK, left)])  # type: ignore[attr-defined]
        if not count:
            break
        hashed.update(buffer[:count])
        left -= count
        progress(size - left)
    return hashed.hexdigest()


def _copy(source: BinaryIO, size: int, path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        left = size
        while left > 0:
            data = source.read(min(CHUNK, left))
            if not data:
                raise MachineError("cut-off", f"cannot write {path}: {left} of {size} bytes are missing")
            left -= len(data)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _sweep(path: Path, disk: Disk) -> None:
    with contextlib.suppress(OSError):
        disk.unlink(path)


def _full(path: Path, error: OSError) -> MachineError:
    found = failed("write", path, error)
    return MachineError("esp-full", found.text) if found.code == "disk-full" else found
