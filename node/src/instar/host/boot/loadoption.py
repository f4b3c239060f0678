"""EFI boot entries as bytes: EFI_LOAD_OPTION with a hard drive's and a file's device path.

UEFI specification 2.10, sections 3.1.3 and 10.3. An entry that names a file on a GPT partition:

    u32 attributes, u16 length of the path list, description (UTF-16, ends with 0), path list, optional data
    path list: hard drive (type 4, subtype 1, 42 bytes), file (type 4, subtype 4), end (0x7f, 0xff)

>>> option = LoadOption("instar slot A", HardDrive(1, 2048, 4096, bytes(16)), "\\\\EFI\\\\instar\\\\a.efi")
>>> decode(encode(option)) == option
True
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from instar.core.errors import InputError

ACTIVE = 1
MEDIA, HARD_DRIVE, FILE_PATH = 4, 1, 4
END_TYPE = 0x7F
END = b"\x7f\xff\x04\x00"
GPT_FORMAT, GUID_SIGNATURE = 2, 2
DRIVE_NODE = struct.Struct("<BBHIQQ16sBB")
MOST_BYTES = 4096  # of one entry; firmware keeps far less


class HardDrive(NamedTuple):
    """A GPT partition. `first` and `sectors` count the disk's logical blocks; `guid` as it lies on the disk."""

    number: int
    first: int
    sectors: int
    guid: bytes


class LoadOption(NamedTuple):
    """`drive` is None, and `path` '', where the entry names something else than a file on a GPT partition."""

    description: str
    drive: HardDrive | None
    path: str
    active: bool = True
    data: bytes = b""


def encode(option: LoadOption) -> bytes:
    """Raises InputError `bad-load-option` for one without a drive, or too long."""
    drive = option.drive
    if drive is None or len(drive.guid) != 16 or not option.path:
        raise _bad("expected a partition with a GUID of 16 bytes and a file's path")
    name = f"{option.path}\0".encode("utf-16-le")
    node = DRIVE_NODE.pack(
        MEDIA, HARD_DRIVE, DRIVE_NODE.size, drive.number, drive.first, drive.sectors, drive.guid,
        GPT_FORMAT, GUID_SIGNATURE,
    )  # fmt: skip
    paths = node + struct.pack("<BBH", MEDIA, FILE_PATH, 4 + len(name)) + name + END
    head = struct.pack("<IH", ACTIVE if option.active else 0, len(paths))
    whole = head + f"{option.description}\0".encode("utf-16-le") + paths + option.data
    if len(whole) > MOST_BYTES:
        raise _bad(f"expected at most {MOST_BYTES} bytes, got {len(whole)}")
    return whole


def decode(data: bytes) -> LoadOption:
    """Read any boot entry. Raises InputError `bad-load-option` when it is cut off or makes no sense."""
    try:
        attributes, length = struct.unpack_from("<IH", data)
        end = next(at for at in range(6, len(data) - 1, 2) if data[at : at + 2] == b"\0\0")
        description = data[6:end].decode("utf-16-le")
        start = end + 2
        if start + length > len(data):
            raise ValueError(f"expected {length} bytes of paths, got {len(data) - start}")
        drive, path = _file(data[start : start + length])
    except (struct.error, StopIteration, ValueError) as error:
        raise _bad(str(error) or "it is cut off") from None
    return LoadOption(description, drive, path, bool(attributes & ACTIVE), data[start + length :])


def _file(paths: bytes) -> tuple[HardDrive | None, str]:
    """The first device path's partition and file, where it is exactly these two."""
    nodes: list[tuple[int, int, bytes]] = []
    at = 0
    while at < len(paths):
        kind, subtype, length = struct.unpack_from("<BBH", paths, at)
        if length < 4 or at + length > len(paths):
            raise ValueError(f"a path's node of {length} bytes at {at}")
        if kind == END_TYPE:
            break
        nodes.append((kind, subtype, paths[at : at + length]))
        at += length
    if [(kind, subtype) for kind, subtype, _ in nodes] != [(MEDIA, HARD_DRIVE), (MEDIA, FILE_PATH)]:
        return None, ""
    if len(nodes[0][2]) != DRIVE_NODE.size:
        raise ValueError(f"a hard drive's node of {len(nodes[0][2])} bytes")
    _, _, _, number, first, sectors, guid, form, signature = DRIVE_NODE.unpack(nodes[0][2])
    if (form, signature) != (GPT_FORMAT, GUID_SIGNATURE):
        return None, ""
    path = nodes[1][2][4:].decode("utf-16-le").partition("\0")[0]
    return HardDrive(number, first, sectors, guid), path


def order(data: bytes) -> list[int]:
    """The numbers in BootOrder, BootNext or BootCurrent."""
    return [number for (number,) in struct.iter_unpack("<H", data[: len(data) // 2 * 2])]


def order_bytes(numbers: list[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}H", *numbers)


def _bad(text: str) -> InputError:
    return InputError("bad-load-option", f"cannot read a boot entry: {text}")
