"""Unified kernel images: sections appended to systemd's stub, as its documentation (systemd-stub(7)) asks for."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping

from instar.core.errors import InputError
from instar.trust import pe

IMAGE_SIZE_AT, ALIGNMENT_AT, HEADERS_SIZE_AT = 56, 32, 60  # in the optional header
READABLE_DATA = 0x4000_0040  # IMAGE_SCN_CNT_INITIALIZED_DATA, IMAGE_SCN_MEM_READ
PAGE = 4096


def build(stub: bytes, added: Mapping[str, bytes]) -> bytes:
    """`stub` with the sections `added`, in their order. Raises InputError `bad-pe`."""
    found = pe.sections(io.BytesIO(stub))
    start = struct.unpack_from("<I", stub, pe.PE_AT)[0]
    optional = start + pe.COFF.size
    count, size = (struct.unpack_from("<H", stub, start + at)[0] for at in (6, 20))
    table = optional + size
    memory_step, file_step = struct.unpack_from("<II", stub, optional + ALIGNMENT_AT)
    room = struct.unpack_from("<I", stub, optional + HEADERS_SIZE_AT)[0]
    if table + (count + len(added)) * pe.SECTION.size > room or set(found) & set(added):
        raise InputError("bad-pe", f"cannot add {', '.join(added)}: no room, or there already")
    image = bytearray(stub)
    image += bytes(_up(len(image), file_step) - len(image))
    address = 0
    for number in range(count):
        fields = pe.SECTION.unpack_from(stub, table + number * pe.SECTION.size)
        address = max(address, fields[1] + fields[2])
    step = max(memory_step, PAGE)
    for name, content in added.items():
        address = _up(address, step)
        # By whole blocks: what comes behind stays where it is in them, and is not fetched anew (docs/os-slots.md).
        padded = _up(len(content), max(file_step, PAGE))
        header = pe.SECTION.pack(
            name.encode(), len(content), address, padded, len(image), 0, 0, 0, 0, READABLE_DATA
        )
        at = table + count * pe.SECTION.size
        image[at : at + pe.SECTION.size] = header
        image += content + bytes(padded - len(content))
        address, count = address + len(content), count + 1
    struct.pack_into("<H", image, start + 6, count)
    struct.pack_into("<I", image, optional + IMAGE_SIZE_AT, _up(address, step))
    return bytes(image)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
