"""Slots as plain firmware entries: BootNext to try one once, BootOrder for good.

Entries are a cache that firmware loses, duplicates and reorders: they are looked for by what they say, made again
when they are lost, and pruned when they are ours and stale. Foreign entries are left alone, behind ours. The
entry on trial stands last in BootOrder too: some firmware overwrites one that BootNext alone names. The image
that firmware falls back to when it has lost everything (EFI/BOOT) is always that of the preferred slot.
"""

from __future__ import annotations

import os
from pathlib import Path

from instar.core.errors import InputError, MachineError
from instar.host.boot import esp as esps
from instar.host.boot.efivars import Variables
from instar.host.boot.loadoption import HardDrive, LoadOption, decode, encode, order, order_bytes
from instar.host.boot.slots import NAMES, BootState, other
from instar.host.files import DISK, Disk, failed
from instar.host.points import reach

FOLDER = "EFI/instar"
DESCRIPTION = "Instar slot "
HIGHEST = 0xFFFF


def fallback(machine: str) -> str:
    """What firmware that has lost all entries starts, on a machine as `uname -m` says it: UEFI 2.10, 3.5.1.1."""
    return f"EFI/BOOT/BOOT{'AA64' if machine == 'aarch64' else 'X64'}.EFI"


FALLBACK = fallback(os.uname().machine)


class Firmware:
    """`esp` is where the partition `drive` is mounted; `memory` keeps the order that we wrote last."""

    name = "firmware"
    copies = 1  # EFI/BOOT

    def __init__(
        self, variables: Variables, esp: Path, drive: HardDrive, memory: Path, disk: Disk = DISK
    ) -> None:
        self._variables, self._esp, self._drive, self._memory = variables, esp, drive, memory
        self._disk = disk

    def kernel(self, slot: str) -> Path:
        return self._esp / FOLDER / f"{slot}.efi"

    # --- looking

    def state(self) -> BootState:
        numbers = self._numbers()
        slots = {number: slot for slot, number in numbers.items()}
        once = order(self._variables.read("BootNext") or b"")
        current = order(self._variables.read("BootCurrent") or b"")
        names = [slots[number] for number in self._order() if number in slots]
        return BootState(
            tuple(names),
            slots.get(once[0], "") if once else "",
            slots.get(current[0], "") if current else "",
            {},
            tuple(self._drift(names)),
        )

    def _drift(self, names: list[str]) -> list[str]:
        found = [
            f"slot {slot} has an image and no entry"
            for slot in NAMES
            if self._has_image(slot) and slot not in names
        ]
        left = self._remembered()
        if left and names and names[0] != left:
            found.append(f"slot {names[0]} goes first, and we left slot {left} first")
        return found

    def _order(self) -> list[int]:
        return order(self._variables.read("BootOrder") or b"")

    def _numbers(self) -> dict[str, int]:
        """Slot -> the number of its entry, as far as there is one that is exactly ours."""
        found: dict[str, int] = {}
        wanted = {encode(self._option(slot)): slot for slot in NAMES}
        for number in self._variables.entries():
            slot = wanted.get(self._variables.read(f"Boot{number:04X}") or b"")
            if slot is not None:
                found.setdefault(slot, number)
        return found

    def _option(self, slot: str) -> LoadOption:
        path = f"\\{FOLDER}/{slot}.efi".replace("/", "\\")
        return LoadOption(f"{DESCRIPTION}{slot.upper()}", self._drive, path)

    # --- choosing

    def forget(self, slot: str) -> None:
        esps.remove(self.kernel(slot), self._disk)

    def prepare(self, slot: str) -> None:
        self._check_image(slot)
        number = self._entry(slot)
        now = self._order()
        if number not in now:
            self._variables.write("BootOrder", order_bytes([*now, number]))

    def try_once(self, slot: str) -> None:
        self.prepare(slot)
        reach("boot:ordered")
        self._variables.write("BootNext", order_bytes([self._entry(slot)]))

    def prefer(self, slot: str, trying: bool = False) -> None:
        self._check_image(slot)
        self._fall_back_to(slot)
        ours = self._put_first(slot)
        once = order(self._variables.read("BootNext") or b"")
        if once and once[0] in ours[1:] and not trying:
            self._variables.delete("BootNext")
        esps.write_small(self._memory, slot.encode(), self._disk)

    def _put_first(self, slot: str) -> list[int]:
        """The slot's entry, then the other slot's, then all others; the numbers of ours."""
        ours = [self._entry(slot)]
        if self._has_image(other(slot)):
            ours.append(self._entry(other(slot)))
        reach("boot:entries")
        foreign = [number for number in self._order() if number not in ours]
        self._variables.write("BootOrder", order_bytes([*ours, *foreign]))
        return ours

    def _check_image(self, slot: str) -> None:
        if not self._has_image(slot):
            text = f"cannot choose slot {slot}: it has no image in {self._esp / FOLDER}"
            raise MachineError("no-kernel-image", text)

    def _has_image(self, slot: str) -> bool:
        path = self.kernel(slot)
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise failed("read", path, error) from error
        return True

    def _fall_back_to(self, slot: str) -> None:
        """The image for firmware that has lost all entries: one that is in no slot any more would never start."""
        source, fallback = self.kernel(slot), self._esp / FALLBACK
        try:
            size = source.stat().st_size
            with source.open("rb") as file:
                sha256 = esps.digest(file, size)
                if _same(fallback, size, sha256):
                    return
                file.seek(0)
                esps.place(file, size, sha256, fallback, self._disk)
        except OSError as error:
            text = f"cannot copy {source.name} to {fallback}: {error.strerror}"
            raise MachineError("disk-failed", text) from None

    def repair(self) -> list[str]:
        done = [*self._swept(), *self._pruned()]
        lost = [slot for slot in NAMES if self._has_image(slot) and slot not in self.state().order]
        for slot in lost:
            done.append(f"made the entry of slot {slot} again")
            self.prepare(slot)
        left = self._remembered()
        first = next(iter(self.state().order), "")
        if left and first != left and self._has_image(left):
            self.prefer(left)
            done.append(f"put slot {left} first again")
        elif first and lost:  # firmware that has lost entries has its own in front by now
            self._put_first(first)
        return done

    def _swept(self) -> list[str]:
        folders = (self._esp / FOLDER, (self._esp / FALLBACK).parent)
        return [line for folder in folders for line in esps.sweep(folder, self._disk)]

    def _pruned(self) -> list[str]:
        """Remove entries of ours that name no slot any more, and second ones of the same slot."""
        keep, done = set(self._numbers().values()), []
        for number in self._variables.entries():
            if number not in keep and self._is_ours(number):
                left = [each for each in self._order() if each != number]
                self._variables.write("BootOrder", order_bytes(left))
                self._variables.delete(f"Boot{number:04X}")
                done.append(f"removed our stale entry {number:04X}")
        return done

    def _is_ours(self, number: int) -> bool:
        try:
            option = decode(self._variables.read(f"Boot{number:04X}") or b"")
        except InputError:
            return False
        return option.description.startswith(DESCRIPTION) and option.path.startswith("\\EFI\\instar\\")

    def _entry(self, slot: str) -> int:
        """The number of the slot's entry, made where there is none."""
        found = self._numbers().get(slot)
        if found is not None:
            return found
        used = {*self._variables.entries(), *self._order()}
        number = next(number for number in range(HIGHEST) if number not in used)
        self._variables.write(f"Boot{number:04X}", encode(self._option(slot)))
        return number

    def _remembered(self) -> str:
        try:
            text = self._memory.read_text().strip()
        except (OSError, UnicodeDecodeError):
            return ""
        return text if text in NAMES else ""


def _same(path: Path, size: int, sha256: str) -> bool:
    try:
        if path.stat().st_size != size:
            return False
        with path.open("rb") as file:
            return esps.digest(file, size) == sha256
    except OSError:
        return False
