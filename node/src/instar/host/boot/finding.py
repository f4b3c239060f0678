"""Find a node's slots: its disk's partitions by name, its EFI system partition, and how the slots are chosen."""

from __future__ import annotations

import os
import platform
import stat
from pathlib import Path
from typing import NamedTuple

from instar.core.errors import MachineError
from instar.host import gpt
from instar.host.boot.counting import LOADER, Counting
from instar.host.boot.efivars import FOLDER, Variables
from instar.host.boot.firmware import Firmware
from instar.host.boot.loadoption import HardDrive
from instar.host.boot.slots import NAMES, Boot, Slot
from instar.host.files import DISK, Disk

BLOCKS = Path("/sys/class/block")
MODEL = Path("/sys/class/dmi/id")


class Found(NamedTuple):
    slots: dict[str, Slot]
    boot: Boot


def find(
    disk: Path, names: tuple[str, str], esp: Path, memory: Path, efivars: Path = FOLDER, files: Disk = DISK
) -> Found:
    """The slots are the partitions `names` of `disk`, a device or an image file; `esp` is where its EFI system
    partition is mounted. Raises MachineError `no-gpt`, `no-partition`, `no-variables`, `disk-failed`."""
    partitions = _partitions(disk)
    return Found(find_slots(disk, names, partitions), _boot(partitions, disk, esp, memory, efivars, files))


def find_slots(
    disk: Path, names: tuple[str, str], partitions: list[gpt.Partition] | None = None
) -> dict[str, Slot]:
    """The slots alone. Raises MachineError `no-gpt`, `no-partition`, `disk-failed`; OSError."""
    found = _partitions(disk) if partitions is None else partitions
    return {
        slot: _slot(disk, slot, gpt.named(found, name, disk)) for slot, name in zip(NAMES, names, strict=True)
    }


def _partitions(disk: Path) -> list[gpt.Partition]:
    try:
        return gpt.partitions(disk)
    except OverflowError:  # good checksums, and a place that no disk has
        text = f"cannot find partitions on {disk}: its table lies where no disk ends"
        raise MachineError("no-gpt", text) from None


def _slot(disk: Path, name: str, partition: gpt.Partition) -> Slot:
    if not stat.S_ISBLK(disk.stat().st_mode):
        return Slot(name, disk, partition.offset, partition.size)
    folder = BLOCKS / Path(os.path.realpath(disk)).name
    for child in sorted(folder.iterdir()):
        number = child / "partition"
        if number.exists() and number.read_text().strip() == str(partition.number):
            return Slot(name, Path("/dev") / child.name, 0, partition.size)
    raise MachineError("no-partition", f"cannot use {disk}: the kernel knows no partition {partition.number}")


def _boot(
    partitions: list[gpt.Partition], disk: Path, esp: Path, memory: Path, efivars: Path, files: Disk
) -> Boot:
    if Counting.usable(esp):
        return Counting(Variables(efivars, LOADER, files), esp, disk=files)
    variables = Variables(efivars, disk=files)
    if not variables.present:
        text = "cannot choose what boots: expected EFI variables, or systemd-boot on the EFI system partition"
        raise MachineError("no-variables", text)
    own = [partition for partition in partitions if partition.kind == gpt.ESP]
    if len(own) != 1:
        text = f"cannot use {disk}: expected one EFI system partition, got {len(own)}"
        raise MachineError("no-partition", text)
    drive = HardDrive(own[0].number, own[0].first, own[0].sectors, own[0].guid)
    return Firmware(variables, esp, drive, memory, files)


def hardware(given: str = "") -> tuple[str, ...]:
    """The names that this machine answers to: those that its operator gave, else what its firmware says."""
    if given:
        return tuple(given.split())
    said = []
    for name in ("product_name", "board_name"):
        try:
            said.append("-".join((MODEL / name).read_text().split()))
        except (OSError, UnicodeDecodeError):
            continue
    return tuple(word for word in said if word) or ("unknown",)


def machine() -> str:
    """As `uname -m` says."""
    return platform.machine()
