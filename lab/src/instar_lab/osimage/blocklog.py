"""A record of every write to a disk.

QEMU's `-blockdev driver=blklogwrites` writes the format of Linux' dm-log-writes (kernel documentation,
device-mapper/log-writes), little-endian, in sectors of the log's own size:

    sector 0:   u64 magic, u64 version, u64 number of entries, u32 bytes of a sector
    each entry: u64 sector, u64 sectors, u64 flags, u64 length of a mark's text; then the data, unless it is a
                discard; the text of a mark lies in the entry's own sector

QEMU makes no marks: programs inside the guest write theirs to MARK_AT, with MAGIC in front.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from instar.core.errors import InputError

FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
SUPER, ENTRY = struct.Struct("<QQQI"), struct.Struct("<QQQQ")
NUMBER, VERSION = 0x6A736677736872, 1
SECTOR = 512
MARK_AT = 1024 * SECTOR  # between a partition table and the first partition
MAGIC = b"instar-lab mark "


class Entry(NamedTuple):
    """`offset` in bytes. A discard has no data, but a `size`; what is a mark has neither, but a `mark`."""

    flags: int
    offset: int
    size: int
    data: memoryview
    mark: str = ""


class Log:
    """The file, mapped: the data of its entries is not copied, and keeps the file open as long as it is held."""

    def __init__(self, path: Path) -> None:
        """Raises InputError `bad-log`."""
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise _bad("it is empty")
            self._view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if len(self._view) < SUPER.size:
            raise _bad("it is cut off")
        magic, version, self.count, self._sector = SUPER.unpack_from(self._view)
        if (magic, version) != (NUMBER, VERSION) or self._sector < ENTRY.size:
            raise _bad(f"expected magic {NUMBER:#x} and version {VERSION}, got {magic:#x} and {version}")

    def entries(self) -> Iterator[Entry]:
        """In the order in which the disk got them. Raises InputError `bad-log` where the file ends early."""
        at, size = self._sector, self._sector
        for number in range(self.count):
            if at + size > len(self._view):
                raise _bad(f"it ends before entry {number} of {self.count}")
            sector, sectors, flags, length = ENTRY.unpack_from(self._view, at)
            head = self._view[at + ENTRY.size : at + size]
            at += size
            count = 0 if flags & DISCARD else sectors * size
            if at + count > len(self._view):
                raise _bad(f"it ends within entry {number} of {self.count}")
            data = self._view[at : at + count]
            at += count
            yield _entry(flags, sector * size, sectors * size, data, bytes(head[:length]))


def _entry(flags: int, offset: int, size: int, data: memoryview, text: bytes) -> Entry:
    if flags & MARK:
        return Entry(flags, 0, 0, data[:0], text.rstrip(b"\0").decode(errors="replace"))
    if offset == MARK_AT and bytes(data[: len(MAGIC)]) == MAGIC:
        said = bytes(data[len(MAGIC) : SECTOR]).rstrip(b"\0").decode(errors="replace")
        return Entry(flags | MARK, offset, size, data, said.partition(" ")[2])
    return Entry(flags, offset, size, data)


def _bad(text: str) -> InputError:
    return InputError("bad-log", f"cannot read the record of writes: {text}")
