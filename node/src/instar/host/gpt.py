"""The partitions of a GPT disk, read only: UEFI specification 2.10, section 5.3.

The first header is believed when both its checksums fit; else the backup one in the disk's last block.
"""

from __future__ import annotations

import os
import struct
import uuid
import zlib
from pathlib import Path
from typing import NamedTuple

from instar.core.errors import MachineError

SIGNATURE = b"EFI PART"
HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
ENTRY = struct.Struct("<16s16sQQQ72s")
BLOCKS = (512, 4096)  # sizes of a logical block
MOST_ENTRIES, MOST_ENTRY = 1024, 4096
ESP = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")


class Partition(NamedTuple):
    """`number` counts from 1; `offset` and `size` are bytes; `guid` as it lies on the disk."""

    number: int
    kind: uuid.UUID
    guid: bytes
    name: str
    offset: int
    size: int
    first: int  # logical block
    sectors: int  # logical blocks


def partitions(disk: Path) -> list[Partition]:
    """Raises MachineError `no-gpt` when neither of the disk's two tables holds, `disk-failed`."""
    try:
        fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise MachineError("disk-failed", f"cannot read {disk}: {error.strerror}") from None
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        for block in BLOCKS:
            for at in (block, size // block * block - block):
                found = _table(fd, at, block)
                if found is not None:
                    return found
    except OSError as error:
        raise MachineError("disk-failed", f"cannot read {disk}: {error.strerror}") from None
    finally:
        os.close(fd)
    raise MachineError("no-gpt", f"cannot find partitions on {disk}: neither of its two tables holds")


def named(found: list[Partition], name: str, disk: Path) -> Partition:
    """The one partition of that name. Raises MachineError `no-partition`."""
    those = [partition for partition in found if partition.name == name]
    if len(those) != 1:
        text = f"cannot use {disk}: expected one partition named {name}, got {len(those)}"
        raise MachineError("no-partition", text)
    return those[0]


def _table(fd: int, at: int, block: int) -> list[Partition] | None:
    """The table whose header lies at byte `at`; None when there is none that holds."""
    head = os.pread(fd, HEADER.size, at) if at > 0 else b""
    if len(head) < HEADER.size or not head.startswith(SIGNATURE):
        return None
    fields = HEADER.unpack(head)
    length, checksum, own, lba, count, size, entries_checksum = (fields[n] for n in (2, 3, 5, 10, 11, 12, 13))
    if not HEADER.size <= length <= block or own * block != at:
        return None
    whole = bytearray(os.pread(fd, length, at))
    whole[16:20] = bytes(4)
    if zlib.crc32(whole) != checksum or not 0 < count <= MOST_ENTRIES or not ENTRY.size <= size <= MOST_ENTRY:
        return None
    table = os.pread(fd, count * size, lba * block)
    if len(table) != count * size or zlib.crc32(table) != entries_checksum:
        return None
    found = []
    for number in range(count):
        kind, guid, first, last, _, name = ENTRY.unpack_from(table, number * size)
        if any(kind) and first <= last:
            text = name.decode("utf-16-le", errors="replace").partition("\0")[0]
            sectors = last - first + 1
            found.append(
                Partition(
                    number + 1, uuid.UUID(bytes_le=kind), guid, text, first * block, sectors * block, first, sectors
                )
            )  # fmt: skip
    return found
