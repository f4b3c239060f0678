"""A judge of a disk that is off: does the firmware find nothing but whole systems on it?

It mounts nothing, and shares no code with what is judged: an own reader of partition tables and of FAT, pefile for
kernel images, and an own check of dm-verity's tree. The rule for every kernel image that the firmware could take,
by an entry or as its fallback:

    its file is all there, it is one that was published, and the root that it names is whole in one of the slots
"""

from __future__ import annotations

import hashlib
import re
import struct
import subprocess
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pefile  # type: ignore[import-untyped]

from instar_lab.osimage.fat import Damaged, Fat
from instar_lab.osimage.packages import PATH

SECTOR, BLOCK = 512, 4096
FOLDERS = ("EFI/instar", "EFI/Linux")
FALLBACK = "EFI/BOOT/BOOTX64.EFI"
ENDING = ".efi"
ESP = bytes.fromhex(
    "28732ac11ff8d211ba4b00a0c93ec93b"
)  # C12A7328-F81F-11D2-BA4B-00A0C93EC93B as it lies there
SLOTS = ("instar-system-a", "instar-system-b")
WORDS = re.compile(rb"instar\.(roothash|blocks)=([0-9a-f]+)")
GPT_HEAD, GPT_ENTRY = struct.Struct("<8sIIIIQQQQ16sQIII"), struct.Struct("<16s16sQQQ72s")
FSCK_S = 60.0
# What fsck.vfat says of a file system that was not put away in good order, and what no power cut may ever do.
HARMFUL = ("share clusters", "bad", "contains a free cluster", "beyond", "circular", "size is", "no clusters")


class Region(NamedTuple):
    """A partition, in bytes."""

    offset: int
    size: int


class Layout(NamedTuple):
    esp: Region
    slots: dict[str, Region]


class Found(NamedTuple):
    """`kernels`: path of a kernel image -> the version that it was published as. `slots`: the same path -> the slot
    with its root. `faults`: in words, why the disk is not as it must be."""

    kernels: dict[str, str]
    slots: dict[str, str]
    faults: tuple[str, ...]


class Kernel(NamedTuple):
    version: str
    root: str
    blocks: int


def layout(view: memoryview) -> Layout:
    """By the first partition table, checksums and all. Raises Damaged."""
    head = GPT_HEAD.unpack_from(view, SECTOR)
    length, checksum, entries, count, size, all_checksum = (head[n] for n in (2, 3, 10, 11, 12, 13))
    whole = bytearray(view[SECTOR : SECTOR + length])
    whole[16:20] = bytes(4)
    table = view[entries * SECTOR : entries * SECTOR + count * size]
    if head[0] != b"EFI PART" or zlib.crc32(whole) != checksum or zlib.crc32(table) != all_checksum:
        raise Damaged("the partition table is not whole")
    esp, slots = None, {}
    for number in range(count):
        kind, _, first, last, _, name = GPT_ENTRY.unpack_from(table, number * size)
        region = Region(first * SECTOR, (last - first + 1) * SECTOR)
        text = name.decode("utf-16-le").partition("\0")[0]
        if kind == ESP:
            esp = region
        elif text in SLOTS:
            slots[text[-1]] = region
    if esp is None or len(slots) != len(SLOTS):
        raise Damaged("the partition table has not all partitions")
    return Layout(esp, slots)


class Judge:
    """`published`: SHA-256 of each kernel image that was ever made for this disk -> its version."""

    def __init__(self, published: Mapping[str, str]) -> None:
        self._published = published
        self._kernels: dict[bytes, Kernel | str] = {}
        self._roots: dict[tuple[bytes, str], bool] = {}
        self._seen: dict[tuple[str, int], bytes] = {}  # digests of what was looked at in this look

    def look(self, view: memoryview) -> Found:
        """Of a whole disk. Never raises for what is on it."""
        try:
            parts = layout(view)
            fat = Fat(view[parts.esp.offset : sum(parts.esp)])
            paths = list(_paths(fat))
        except Damaged as error:
            return Found({}, {}, (str(error),))
        self._seen = {}
        kernels, slots, faults = dict[str, str](), dict[str, str](), list[str]()
        for path in paths:
            try:
                kernel = self._kernel(path, fat.read(path) or b"")
            except Damaged as error:
                faults.append(str(error))
                continue
            slot = self._slot(view, parts, kernel)
            if slot:
                kernels[path], slots[path] = kernel.version, slot
            else:
                faults.append(f"{path} is of {kernel.version}, whose root is whole in no slot")
        return Found(kernels, slots, tuple(faults))

    def _kernel(self, path: str, data: bytes) -> Kernel:
        digest = hashlib.sha256(data).digest()
        if digest not in self._kernels:
            self._kernels[digest] = _parsed(data, self._published.get(digest.hex(), ""))
        found = self._kernels[digest]
        if isinstance(found, str):
            raise Damaged(f"{path}: {found}")
        return found

    def _slot(self, view: memoryview, parts: Layout, kernel: Kernel) -> str:
        for slot, region in parts.slots.items():
            used = view[region.offset : region.offset + min(region.size, verity_bytes(kernel.blocks))]
            if (slot, len(used)) not in self._seen:
                self._seen[slot, len(used)] = hashlib.sha256(used).digest()
            key = (self._seen[slot, len(used)], kernel.root)
            if key not in self._roots:
                self._roots[key] = verity_holds(used, kernel.blocks, kernel.root)
            if self._roots[key]:
                return slot
        return ""


def _paths(fat: Fat) -> Iterator[str]:
    """Everything that the firmware may start. A temporary file has another ending."""
    for folder in FOLDERS:
        for name in fat.files(folder):
            if name.lower().endswith(ENDING):
                yield f"{folder}/{name}"
    if fat.find(FALLBACK) is not None:
        yield FALLBACK


def _parsed(data: bytes, version: str) -> Kernel | str:
    """What a kernel image says of itself; in words why it is none."""
    try:
        image = pefile.PE(data=data, fast_load=True)
    except pefile.PEFormatError as error:
        return f"{len(data)} bytes, no kernel image: {error}"
    line = b""
    for section in image.sections:
        at, size = section.PointerToRawData, section.SizeOfRawData
        if at + size > len(data):
            return f"section {section.Name!r} ends behind the file"
        if section.Name.rstrip(b"\0") == b".cmdline":
            line = data[at : at + min(size, section.Misc_VirtualSize)]
    words = {word.decode(): value.decode() for word, value in WORDS.findall(line)}
    if set(words) != {"roothash", "blocks"}:
        return "its command line names no root"
    if not version:
        return "its content is not of any image that was published"
    return Kernel(version, words["roothash"], int(words["blocks"]))


# --- dm-verity: SHA-256, blocks of 4,096 bytes, no salt, the tree behind the data and one block of header


def verity_bytes(blocks: int) -> int:
    """How much of a slot a root of so many blocks of data needs, with header and tree."""
    total, level = blocks + 1, blocks
    while level > 1:
        level = -(-level // (BLOCK // 32))
        total += level
    return total * BLOCK


def verity_holds(view: memoryview, blocks: int, root: str) -> bool:
    """Whether the data is what the root hash was made of, and every level of the tree on the disk too."""
    if len(view) < verity_bytes(blocks):
        return False
    level, levels = view[: blocks * BLOCK], list[bytes]()
    while True:
        hashes = b"".join(
            hashlib.sha256(level[at : at + BLOCK]).digest() for at in range(0, len(level), BLOCK)
        )
        if len(level) == BLOCK:
            break
        padded = hashes + bytes(-len(hashes) % BLOCK)
        levels.insert(0, padded)  # the top lies first
        level = memoryview(padded)
    tree = b"".join(levels)
    start = (blocks + 1) * BLOCK
    return hashes.hex() == root and bytes(view[start : start + len(tree)]) == tree


def fsck(image: Path) -> dict[str, list[str]]:
    """Path -> what fsck.vfat finds wrong with it that no power cut may do to a file in use. Lost clusters, two tables
    that differ and a count that is off are the price of any cut on FAT, and harm no file."""
    done = subprocess.run(
        ["fsck.vfat", "-n", str(image)], capture_output=True, text=True, timeout=FSCK_S, check=False,
        env={"PATH": PATH, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    found: dict[str, list[str]] = {}
    paths, more = list[str](), False
    for line in done.stdout.splitlines():
        text = line.strip()
        if line.startswith("/"):
            paths = [*(paths if more else ()), text.removesuffix("and").strip(" /")]
            more = text.endswith(" and")
        elif any(word in text.lower() for word in HARMFUL):
            for path in paths:
                found.setdefault(path, []).append(text)
    return found
