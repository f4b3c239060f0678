"""A reader of FAT32 in memory, for judges: what it cannot read as it should be is Damaged, and never guessed.

Microsoft's FAT specification (fatgen103). It reads as firmware does: by the first of the two tables. Written apart
from everything that writes, so that the two cannot share a mistake.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

ENTRY, LONG_NAME, FOLDER, LABEL = 32, 0x0F, 0x10, 0x08
DELETED, LAST, LONG_LAST = 0xE5, 0x00, 0x40
MASK, END, BAD = 0x0FFF_FFFF, 0x0FFF_FFF8, 0x0FFF_FFF7
CHARACTERS = ((1, 11), (14, 26), (28, 32))  # where an entry of a long name holds 13 of them


class Damaged(Exception):
    """The file system, or a file in it, is not whole; the text says what."""


class File(NamedTuple):
    """A file or a folder. `cluster` is its first one, 0 when it has none."""

    name: str
    folder: bool
    cluster: int
    size: int


class Fat:
    """`view` is the whole partition. Holds no content: look again after a change, with a new one."""

    def __init__(self, view: memoryview) -> None:
        """Raises Damaged when it is no FAT32."""
        sector, per, reserved, tables = struct.unpack_from("<HBHB", view, 11)
        (small,) = struct.unpack_from("<H", view, 22)  # of FAT12 and FAT16 only
        self._sectors, size, root = struct.unpack_from("<II4xI", view, 32)
        if bytes(view[510:512]) != b"\x55\xaa" or small or not all((sector, per, reserved, tables, size)):
            raise Damaged("the first sector is no FAT32's")
        if self._sectors * sector > len(view):
            raise Damaged("the file system is longer than its partition")
        self._view, self.cluster_bytes, self._root = view, sector * per, root
        self._data = (reserved + tables * size) * sector
        self._count = (self._sectors * sector - self._data) // self.cluster_bytes
        table = view[reserved * sector : (reserved + size) * sector]
        self._table = table.cast("I")  # little-endian, as every machine that runs these tests
        if len(self._table) < self._count + 2:
            raise Damaged("the table is too short for the partition")

    # --- files

    def read(self, path: str) -> bytes | None:
        """A file's content; None when there is no such name. Raises Damaged unless it is all there."""
        found = self.find(path)
        if found is None:
            return None
        chain = self.chain(found)
        if len(chain) < -(-found.size // self.cluster_bytes):
            had = len(chain) * self.cluster_bytes
            raise Damaged(f"{path} has {had} bytes of {found.size}: its chain ends early")
        return self._content(chain)[: found.size]

    def find(self, path: str) -> File | None:
        """By name, upper case or lower. Raises Damaged when a folder on the way cannot be read."""
        at = File("", True, self._root, 0)
        for name in path.split("/"):
            if not at.folder:
                return None
            here = {each.name.lower(): each for each in self.list(at)}
            if name.lower() not in here:
                return None
            at = here[name.lower()]
        return at

    def files(self, path: str) -> list[str]:
        """The names of the files in a folder; nothing when there is no such folder."""
        folder = self.find(path)
        if folder is None or not folder.folder:
            return []
        return [each.name for each in self.list(folder) if not each.folder]

    def walk(self) -> Iterator[tuple[str, File]]:
        """Everything below the root, with its path."""
        todo = [("", File("", True, self._root, 0))]
        while todo:
            path, folder = todo.pop()
            for each in self.list(folder):
                name = f"{path}{each.name}"
                yield name, each
                if each.folder:
                    todo.append((f"{name}/", each))

    def shared(self) -> list[str]:
        """Files that claim a cluster which another one has claimed: each of them a loss in waiting."""
        owner: dict[int, str] = {}
        found = []
        for path, each in self.walk():
            chain = self.chain(each)
            if any(cluster in owner for cluster in chain):
                found.append(path)
            owner.update(dict.fromkeys(chain, path))
        return found

    # --- below files

    def chain(self, file: File) -> list[int]:
        """Its clusters in order. Raises Damaged when the chain meets a free or bad cluster, or itself."""
        found, at = list[int](), file.cluster
        if at == 0 and not file.folder:
            return []
        while at < END:
            if not 2 <= at < self._count + 2 or at == BAD or len(found) > self._count:
                raise Damaged(f"{file.name or 'the root'}: its chain leads to cluster {at:#x}")
            found.append(at)
            at = self._table[at] & MASK
        return found

    def offset(self, cluster: int) -> int:
        """Where a cluster begins, in bytes."""
        return int(self._data) + (cluster - 2) * int(self.cluster_bytes)

    def _content(self, chain: list[int]) -> bytes:
        pieces, first = [], 0
        while first < len(chain):
            last = first
            while last + 1 < len(chain) and chain[last + 1] == chain[last] + 1:
                last += 1
            start = self.offset(chain[first])
            pieces.append(self._view[start : start + (last - first + 1) * self.cluster_bytes])
            first = last + 1
        return b"".join(pieces)

    def list(self, folder: File) -> list[File]:
        """What is in a folder, by its long names where it has some that fit. Raises Damaged."""
        data, found, long = self._content(self.chain(folder)), list[File](), dict[int, bytes]()
        checksum = -1
        for at in range(0, len(data), ENTRY):
            raw = data[at : at + ENTRY]
            if raw[0] == LAST:
                break
            if raw[0] == DELETED:
                long = {}
            elif raw[11] == LONG_NAME:
                if raw[0] & LONG_LAST:
                    long, checksum = {}, raw[13]
                if raw[13] == checksum:
                    long[raw[0] & ~LONG_LAST] = b"".join(raw[low:high] for low, high in CHARACTERS)
            else:
                name = _long(long) if long and checksum == _checksum(raw[:11]) else ""
                found += _file(raw, name or _short(raw))
                long = {}
        return found


def _file(raw: bytes, name: str) -> list[File]:
    high, low, size = struct.unpack("<H4xHI", raw[20:])
    if raw[11] & LABEL or name in (".", ".."):
        return []
    return [File(name, bool(raw[11] & FOLDER), (high << 16 | low) & MASK, size)]


def _long(parts: dict[int, bytes]) -> str:
    whole = b"".join(parts[number] for number in sorted(parts))
    return whole.decode("utf-16-le", errors="replace").partition("\0")[0]


def _short(raw: bytes) -> str:
    case = raw[12]
    stem, ending = (part.decode("cp437").rstrip() for part in (raw[:8], raw[8:11]))
    stem = stem.lower() if case & 0x08 else stem
    ending = ending.lower() if case & 0x10 else ending
    return f"{stem}.{ending}" if ending else stem


def _checksum(short: bytes) -> int:
    total = 0
    for byte in short:
        total = ((total >> 1) | (total & 1) << 7) + byte & 0xFF
    return total
