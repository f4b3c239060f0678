"""What a machine that is off holds, read by others' programs: nothing here uses the node's own code.

The variable store by virt-firmware, the EFI system partition by mtools, kernel images by pefile, slots by their
bytes. A scenario asserts on these after `Machine.power_off()` or `cut_power()`, besides the serial line and what
the server saw:

    firmware = oracles.Firmware.of(machine.vm.variables)
    assert firmware.order[:2] == ["\\EFI\\instar\\b.efi", "\\EFI\\instar\\a.efi"]
    esp = oracles.Esp(machine.disk)
    assert esp.kernel("EFI/instar/b.efi").version == "1.1.0"
    assert oracles.holds(machine.disk, "b", image.root)
"""

from __future__ import annotations

import hashlib
import re
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pefile
from virt.firmware.efi.bootentry import BootEntry
from virt.firmware.varstore.edk2 import Edk2VarStore

from instar_lab.osimage.disk import AT_MIB, MIB

FILE = re.compile(r"FilePath\(([^)]*)\)")
FALLBACK = "EFI/BOOT/BOOTX64.EFI"
PIECE = 1 << 20
TOOLS_S = 60.0


class Firmware(NamedTuple):
    """`order` names entries by the file that they start, or by their title where they start none; `once` is what
    BootNext names, '' where there is none; `entries` has all Boot#### by number; `names` has all variables."""

    order: list[str]
    once: str
    entries: dict[str, str]
    names: frozenset[str]

    @classmethod
    def of(cls, path: Path) -> Firmware:
        found = Edk2VarStore(str(path)).get_varlist()
        entries = {
            name.removeprefix("Boot"): _starts(BootEntry(data=variable.data))
            for name, variable in found.items()
            if re.fullmatch("Boot[0-9A-F]{4}", name)
        }
        data = {name: bytes(found[name].data) for name in ("BootOrder", "BootNext") if name in found}
        order, once = (
            [entries.get(number, f"no entry {number}") for number in _numbers(data.get(name, b""))]
            for name in ("BootOrder", "BootNext")
        )
        return cls(order, once[0] if once else "", entries, frozenset(found))

    @property
    def slots(self) -> str:
        """Our slots in the order in which the firmware takes them: 'ab', 'b', ''."""
        ours = (re.fullmatch(r"\\EFI\\instar\\([ab])\.efi", name) for name in self.order)
        return "".join(match[1] for match in ours if match)


def _numbers(data: bytes) -> list[str]:
    return [f"{number:04X}" for (number,) in struct.iter_unpack("<H", data)]


def _starts(entry: BootEntry) -> str:
    match = FILE.search(str(entry.devicepath))
    return match[1] if match else str(entry.title)


class Kernel(NamedTuple):
    """A unified kernel image, as pefile reads it. `version` stands in `.osrel`, `line` is its command line."""

    version: str
    line: str
    signed: bool
    sections: tuple[str, ...]


class Esp:
    """The EFI system partition of `disk`. Paths have no leading slash."""

    def __init__(self, disk: Path) -> None:
        self._image = f"{disk}@@{AT_MIB['esp']}M"

    def files(self) -> dict[str, int]:
        """Path -> size in bytes, of all files."""
        said = _run("mdir", "-/", "-b", "-i", self._image, "::/")
        names = [line.removeprefix("::/") for line in said.decode().splitlines() if not line.endswith("/")]
        return {name: len(self.read(name)) for name in names}

    def read(self, path: str) -> bytes:
        return _run("mcopy", "-n", "-i", self._image, f"::/{path}", "-")

    def kernel(self, path: str) -> Kernel:
        image = pefile.PE(data=self.read(path), fast_load=True)
        sections = {each.Name.rstrip(b"\0").decode(): each for each in image.sections}

        def text(name: str) -> str:
            section = sections[name]
            data: bytes = section.get_data()[: section.Misc_VirtualSize]
            return data.decode().strip("\0\n ")

        release = dict(line.partition("=")[::2] for line in text(".osrel").splitlines())
        signatures = image.OPTIONAL_HEADER.DATA_DIRECTORY[4]  # IMAGE_DIRECTORY_ENTRY_SECURITY
        return Kernel(release["VERSION_ID"], text(".cmdline"), signatures.Size > 0, tuple(sections))


def holds(disk: Path, slot: str, image: Path) -> bool:
    """Whether the slot begins with exactly this file."""
    return slot_digest(disk, slot, image.stat().st_size) == hashlib.sha256(image.read_bytes()).hexdigest()


def slot_digest(disk: Path, slot: str, size: int) -> str:
    """SHA-256 of the first `size` bytes of a slot."""
    hashed = hashlib.sha256()
    with disk.open("rb") as file:
        file.seek(AT_MIB[slot] * MIB)
        while size > 0:
            data = file.read(min(PIECE, size))
            hashed.update(data)
            size -= len(data)
    return hashed.hexdigest()


def _run(*words: str) -> bytes:
    done = subprocess.run(words, capture_output=True, timeout=TOOLS_S, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr.decode(errors='replace')[-500:]}"
    return done.stdout
