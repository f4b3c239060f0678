"""What a power cut in the middle of a rename can leave on vfat: two names on the same clusters."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from instar_lab.osimage.disk import AT_MIB, ESP_MIB, MIB
from instar_lab.osimage.fat import DELETED, ENTRY, FOLDER, LABEL, LAST, Fat

CLUSTER_HIGH, CLUSTER_LOW, SIZE = 20, 26, 28  # in a file's entry


def on_the_clusters_of(disk: Path, left: str, kept: str) -> None:
    """Have the empty file `left` lie where `kept`, of the same folder, lies. For a disk of a machine that is off."""
    start, end = AT_MIB["esp"] * MIB, (AT_MIB["esp"] + ESP_MIB) * MIB
    with (
        disk.open("r+b") as file,
        mmap.mmap(file.fileno(), 0) as whole,
        memoryview(whole) as view,
        view[start:end] as esp,
    ):
        _cross(esp, left, kept)


def _cross(esp: memoryview, left: str, kept: str) -> None:
    fat = Fat(esp)
    other, folder = fat.find(kept), fat.find(str(Path(kept).parent))
    assert other is not None, kept
    assert folder is not None, kept
    starts = (fat.offset(cluster) for cluster in fat.chain(folder))
    entries = [at for start in starts for at in range(start, start + fat.cluster_bytes, ENTRY)]
    (at,) = (at for at in entries if _is_empty_file(bytes(esp[at : at + ENTRY])))
    struct.pack_into("<H", esp, at + CLUSTER_HIGH, other.cluster >> 16)
    struct.pack_into("<H", esp, at + CLUSTER_LOW, other.cluster & 0xFFFF)
    struct.pack_into("<I", esp, at + SIZE, other.size)
    assert left in Fat(esp).shared() or kept in Fat(esp).shared()


def _is_empty_file(entry: bytes) -> bool:
    used = entry[0] not in (DELETED, LAST)
    plain = entry[11] & (LABEL | FOLDER) == 0  # and no piece of a long name
    return used and plain and not any(entry[CLUSTER_LOW:])
