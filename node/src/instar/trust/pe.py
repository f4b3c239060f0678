"""The sections of a PE file, where a unified kernel image keeps kernel, command line and initial file system.

Microsoft's PE format, and the Boot Loader Specification's type 2. Only headers are read, whatever the size.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, NamedTuple

from instar.core.errors import InputError

PE_AT = 0x3C  # where a PE file says at which byte its header begins
COFF = struct.Struct("<4sHHIIIHH")
SECTION = struct.Struct("<8sIIIIIIHHI")
MOST_SECTIONS, MOST_HEADER = 96, 1 << 20


class Section(NamedTuple):
    """`size` bytes from byte `offset` of the file, padding left out."""

    name: str
    offset: int
    size: int


def sections(file: BinaryIO) -> dict[str, Section]:
    """All sections by name. Raises InputError `bad-pe`: no PE file, cut off, or two sections of one name."""
    end = file.seek(0, 2)
    start = struct.unpack("<I", _read(file, PE_AT, 4, end))[0] if _read(file, 0, 2, end) == b"MZ" else 0
    if not 0 < start < MOST_HEADER:
        raise _bad("it has no PE header")
    magic, _, count, _, _, _, optional, _ = COFF.unpack(_read(file, start, COFF.size, end))
    if magic != b"PE\0\0" or count > MOST_SECTIONS:
        raise _bad("it has no PE header")
    found: dict[str, Section] = {}
    table = start + COFF.size + optional
    for number in range(count):
        fields = SECTION.unpack(_read(file, table + number * SECTION.size, SECTION.size, end))
        name, virtual, _, raw, at = fields[:5]
        text = name.rstrip(b"\0").decode("ascii", errors="replace")
        if raw and at + raw > end:
            raise _bad(f"section {text} ends behind the file: it is cut off")
        if text in found:
            raise _bad(f"it has two sections {text}")
        found[text] = Section(text, at, min(virtual, raw))
    return found


def read(file: BinaryIO, section: Section, most: int) -> bytes:
    """A section's bytes. Raises InputError `bad-pe` when it has more than `most`."""
    if section.size > most:
        raise _bad(f"section {section.name} has {section.size} bytes, expected at most {most}")
    file.seek(section.offset)
    return file.read(section.size)


def _read(file: BinaryIO, at: int, count: int, end: int) -> bytes:
    if at + count > end:
        raise _bad("it is cut off")
    file.seek(at)
    return file.read(count)


def _bad(text: str) -> InputError:
    return InputError("bad-pe", f"cannot read the kernel image: {text}")
