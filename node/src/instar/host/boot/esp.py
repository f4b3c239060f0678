"""The EFI system partition: kernel images put there so that a power cut leaves them whole or absent.

On vfat (seen with Linux 6.1) fsync of a file, rename, and fsync of the folder leave an entry of 0 bytes on the
disk: the *renamed* file must be opened again and synced, then its folder. And a file that is removed or replaced is
kept open until its folder is on the disk: its clusters are freed when nobody holds it any more, and a power cut
may keep that and lose the folder's change; the old name then leads into nothing (seen by crash replay). The file
system is never mounted synchronous: an installation took ten times as long.

A power cut in the middle of a rename can leave both names, where their entries lie in different sectors: two files
on the same clusters. To remove one of them would free the clusters of the other. Such a name is set aside for
good instead: it gets a name that nothing looks for, and the clusters stay with the file that is needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import struct
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import BinaryIO

from instar.core.errors import MachineError
from instar.host.files import DISK, Disk, failed, make_folder
from instar.host.points import reach

CHUNK = 1 << 20
RESERVE = 1 << 20  # bytes left free for folders and the firmware's own files
NEW = ".new"  # ends the name of a file that is not whole yet
ASIDE = re.compile(r".*\.shared\d+", re.IGNORECASE)  # the name of a file that nobody touches any more
FIBMAP = 1  # linux/fs.h: where on the disk a file's block lies


def check_room(esp: Path, image: int, copies: int = 1, freed: int = 0) -> None:
    """See that `copies` more images of `image` bytes fit beside those of both slots, once `freed` bytes have gone.

    Raises MachineError `esp-full`, `mounted-read-only` before anything is written.
    """
    try:
        found = os.statvfs(esp)
    except OSError as error:
        raise failed("look at", esp, error) from error
    if found.f_flag & os.ST_RDONLY:  # a damaged one is made so by the kernel, too
        raise MachineError("mounted-read-only", f"cannot install: the file system of {esp} is read-only")
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize + freed
    needed = (2 + copies) * image + RESERVE
    if total < needed:
        text = f"cannot install: expected an EFI system partition of {needed} bytes at least, got {total}"
        raise MachineError("esp-full", text)
    if free < copies * image + RESERVE:
        text = f"cannot install: expected {copies * image + RESERVE} free bytes in {esp}, got {free}"
        raise MachineError("esp-full", text)


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def place(source: BinaryIO, size: int, sha256: str, path: Path, disk: Disk = DISK) -> None:
    """Make `path` from `size` bytes of `source`, read back with the page cache dropped. Replaces what was there.

    Raises MachineError `esp-full`, `disk-failed`, `not-as-written`; the old file is then still whole.
    """
    make_folder(path.parent, 0o755, disk)
    temporary = path.with_name(f"{path.name}{NEW}")
    remove(temporary, disk)  # to write over it is to free its clusters, too
    try:
        _copy(source, size, temporary, disk)
        reach("esp:written")
        check_file(temporary, size, sha256)
        with _held(path):
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
    with contextlib.suppress(OSError):  # one that cannot be read is replaced
        if path.read_bytes() == data:
            return False
    make_folder(path.parent, 0o755, disk)
    temporary = path.with_name(f"{path.name}{NEW}")
    remove(temporary, disk)
    try:
        disk.write_new(temporary, data, 0o644)
        with _held(path):
            disk.rename(temporary, path)
            disk.sync_file(path)
            disk.sync_folder(path.parent)
    except OSError as error:
        _sweep(temporary, disk)
        raise _full(path, error) from error
    return True


def remove(path: Path, disk: Disk = DISK) -> str:
    """Remove an image, durably: what is about to be overwritten must not be bootable by name. Absent is fine.

    One that lies on the clusters of another file in its folder is set aside. What was done, in words.
    """
    try:
        if (other := _sharing(path)) is not None:
            aside = _set_aside(path, disk)
            return f"set {path.name} aside as {aside.name}: it lies on the clusters of {other.name}"
        with _held(path):
            disk.unlink(path)
            disk.sync_folder(path.parent)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise failed("remove", path, error) from error
    return f"removed {path.name}"


def _sharing(path: Path) -> Path | None:
    """Another file of the folder on the same clusters."""
    if not path.is_file():
        return None
    beside = (each for each in sorted(path.parent.iterdir()) if not ASIDE.fullmatch(each.name))
    return next((each for each in beside if each != path and each.is_file() and _is_shared(path, each)), None)


def _is_shared(path: Path, other: Path) -> bool:
    """Who may not see where files lie believes that the same content is in the same place."""
    try:
        return (block := _block(path)) != 0 and block == _block(other)
    except PermissionError:
        size = size_of(path)
        if not size or size != size_of(other):
            return False
        with path.open("rb") as one, other.open("rb") as two:
            return digest(one, size) == digest(two, size)


def _block(path: Path) -> int:
    """Where its first block lies; 0 where it has none, or the file system has no blocks. Raises PermissionError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(struct.unpack("i", fcntl.ioctl(fd, FIBMAP, struct.pack("i", 0)))[0])
    except PermissionError:
        raise
    except OSError:
        return 0
    finally:
        os.close(fd)


def _set_aside(path: Path, disk: Disk) -> Path:
    names = (path.with_name(f"{path.name}.shared{number}") for number in count(1))
    aside = next(name for name in names if not name.exists())
    disk.rename(path, aside)
    disk.sync_folder(path.parent)
    return aside


def sync(path: Path, disk: Disk = DISK) -> None:
    """See that a file that is there is on the disk, with its name: a kill may have come before."""
    try:
        disk.sync_file(path)
        disk.sync_folder(path.parent)
    except OSError as error:
        raise failed("sync", path, error) from error


def sweep(folder: Path, disk: Disk = DISK) -> list[str]:
    """Remove what a cut-off write has left in `folder`: it takes the room of a whole image. What was removed."""
    try:
        found = sorted(path for path in folder.iterdir() if path.name.endswith(f".efi{NEW}"))
    except OSError:
        return []
    return [f"{remove(path, disk)}; a write was cut off" for path in found]


def move(old: Path, new: Path, disk: Disk = DISK) -> None:
    """Give an image another name. It is copied, and the old one removed last: on vfat, a power cut right after a
    rename leaves a file without bytes, and this one may be the only copy. Raises as `place` does."""
    try:
        size = old.stat().st_size
        with old.open("rb") as file:
            sha256 = digest(file, size)
            file.seek(0)
            place(file, size, sha256, new, disk)
    except OSError as error:
        raise failed("copy", old, error) from error
    remove(old, disk)


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


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Keep the file that has this name now, if any, until its going is on the disk."""
    fd = -1
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def _copy(source: BinaryIO, size: int, path: Path, disk: Disk) -> None:
    fd = disk.create(path, 0o644)
    try:
        left = size
        while left > 0:
            data = source.read(min(CHUNK, left))
            if not data:
                raise MachineError("cut-off", f"cannot write {path}: {left} of {size} bytes are missing")
            disk.write_at(fd, data, size - left)
            left -= len(data)
        disk.sync_open(fd)
    finally:
        os.close(fd)


def _sweep(path: Path, disk: Disk) -> None:
    with contextlib.suppress(OSError):
        disk.unlink(path)


def _full(path: Path, error: OSError) -> MachineError:
    found = failed("write", path, error)
    return MachineError("esp-full", found.text) if found.code == "disk-full" else found
