"""A disk of two slots, small and made of bytes: for tests of what reads and judges disks."""

from __future__ import annotations

import hashlib
import random
import struct
import uuid
import zlib

from tests.node.boot.test_disks import image

SECTOR, BLOCK = 512, 4096
CLUSTERS, RESERVED = 1200, 32
TABLE = (CLUSTERS + 2) * 4 // SECTOR + 1  # sectors
ESP_AT, ESP_SECTORS = 2048, RESERVED + 2 * TABLE + CLUSTERS
BLOCKS = 130  # of data in a root: its tree has two levels
SLOT_SECTORS = 200 * BLOCK // SECTOR
ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
LINUX = "0fc63daf-8483-4772-8e79-3d69d8477de4"
END = 0x0FFF_FFFF


class System:
    """A root with its tree, and a kernel image that names it."""

    def __init__(self, version: str, seed: int) -> None:
        self.version = version
        data = random.Random(seed).randbytes(BLOCKS * BLOCK)
        leaves = b"".join(hashlib.sha256(data[at : at + BLOCK]).digest() for at in range(0, len(data), BLOCK))
        leaves += bytes(-len(leaves) % BLOCK)
        top = b"".join(
            hashlib.sha256(leaves[at : at + BLOCK]).digest() for at in range(0, len(leaves), BLOCK)
        )
        top += bytes(BLOCK - len(top))
        self.hash = hashlib.sha256(top).hexdigest()
        self.root = data + b"header".ljust(BLOCK, b"\0") + top + leaves
        line = f"quiet instar.roothash={self.hash} instar.blocks={BLOCKS}"
        self.kernel = image({".linux": b"k" * 5000, ".initrd": b"i" * 900, ".cmdline": line.encode()})


class SmallFat:
    """FAT32 with clusters of one sector. `files`: path -> content, below two folders at most."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.table = [0x0FFF_FFF8, END, END]
        self.clusters: dict[int, bytes] = {}
        tree: dict[str, list[bytes]] = {"": []}
        for path, content in files.items():
            *folders, name = path.split("/")
            for depth in range(len(folders)):
                tree.setdefault("/".join(folders[: depth + 1]), [])
            tree["/".join(folders)].append(_entry(name, 0x20, self._add(content), len(content)))
        for folder in sorted(tree, key=lambda each: -each.count("/") if each else 9):
            data = b"".join(tree[folder])
            if folder:
                parent, _, name = folder.rpartition("/")
                tree[parent].append(_entry(name, 0x10, self._add(data), 0))
            else:
                self.clusters[2] = data.ljust(SECTOR, b"\0")
                assert len(data) <= SECTOR

    def _add(self, content: bytes) -> int:
        first = len(self.table)
        pieces = [content[at : at + SECTOR] for at in range(0, len(content), SECTOR)]
        for number, piece in enumerate(pieces):
            self.clusters[first + number] = piece.ljust(SECTOR, b"\0")
            self.table.append(END if number == len(pieces) - 1 else first + number + 1)
        return first if pieces else 0

    def data(self) -> bytes:
        head = bytearray(RESERVED * SECTOR)
        struct.pack_into("<HBHB", head, 11, SECTOR, 1, RESERVED, 2)
        struct.pack_into("<II4xI", head, 32, ESP_SECTORS, TABLE, 2)
        head[510:512] = b"\x55\xaa"
        table = struct.pack(f"<{len(self.table)}I", *self.table).ljust(TABLE * SECTOR, b"\0")
        body = b"".join(self.clusters.get(number, bytes(SECTOR)) for number in range(2, CLUSTERS + 2))
        return bytes(head) + table + table + body

    def table_at(self, cluster: int) -> int:
        return RESERVED * SECTOR + 4 * cluster


def _entry(name: str, kind: int, cluster: int, size: int) -> bytes:
    """With a long name in front, as Linux writes one for lower case."""
    stem, _, ending = name.upper().partition(".")
    short = stem[:8].ljust(8).encode() + ending[:3].ljust(3).encode()
    checksum = 0
    for byte in short:
        checksum = (((checksum & 1) << 7) | (checksum >> 1)) + byte & 0xFF
    wide = f"{name}\0".encode("utf-16-le")
    wide += b"\xff" * (-len(wide) % 26)
    pieces = [wide[at : at + 26] for at in range(0, len(wide), 26)]
    long = b""
    for number in range(len(pieces), 0, -1):
        part, first = pieces[number - 1], number | (0x40 if number == len(pieces) else 0)
        long += bytes((first,)) + part[:10] + bytes((0x0F, 0, checksum)) + part[10:22] + bytes(2) + part[22:]
    return long + short + bytes((kind,)) + struct.pack("<8xH4xHI", cluster >> 16, cluster & 0xFFFF, size)


def disk(files: dict[str, bytes], slots: dict[str, bytes]) -> bytearray:
    """A whole disk; `slots` has the content of a and b."""
    sizes = [("esp", ESP, ESP_SECTORS), *((f"instar-system-{name}", LINUX, SLOT_SECTORS) for name in "ab")]
    table, at, places = b"", ESP_AT, []
    for name, kind, sectors in sizes:
        table += uuid.UUID(kind).bytes_le + uuid.UUID(int=at).bytes_le
        table += struct.pack("<QQQ72s", at, at + sectors - 1, 0, name.encode("utf-16-le"))
        places.append(at * SECTOR)
        at += sectors
    table = table.ljust(128 * 128, b"\0")
    fields = (1, at, 34, at - 34, bytes(16), 2, 128, 128, zlib.crc32(table))
    head = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, *fields)
    head = head[:16] + struct.pack("<I", zlib.crc32(head)) + head[20:]
    whole = bytearray(at * SECTOR)
    contents = [SmallFat(files).data(), slots["a"], slots["b"]]
    for start, content in zip([SECTOR, 2 * SECTOR, *places], [head, table, *contents], strict=True):
        whole[start : start + len(content)] = content
    return whole
