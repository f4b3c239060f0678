"""Slots under systemd-boot, with its counting of tries: the sturdier way, for it needs no firmware entry of ours.

The images lie in EFI/Linux as `instar-<slot>.efi`; one on trial as `instar-<slot>+<left>-<done>.efi`, whose
numbers the loader changes at each try (Automatic Boot Assessment, systemd.io). `default` in loader.conf names the
preferred slot; LoaderEntryOneShot the one to try. When the tries of the slot on trial are used up, or nobody
set it again, the loader takes the preferred one. A file without bytes, which a power cut can leave on vfat, is
no image. LoaderEntryDefault goes before `default` (loader.conf(5)): a key in the loader's menu and `bootctl
set-default` set it, we never do, and it is removed where it names anything but the preferred slot.
"""

from __future__ import annotations

import re
from pathlib import Path

from instar.core.errors import MachineError
from instar.host.boot import esp as esps
from instar.host.boot.efivars import Variables
from instar.host.boot.slots import NAMES, BootState, other
from instar.host.files import DISK, Disk, failed
from instar.host.points import reach

LOADER = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"  # vendor of the Boot Loader Interface's variables
FOLDER, SETTINGS, PROGRAM = "EFI/Linux", "loader/loader.conf", "EFI/systemd/systemd-bootx64.efi"
NAME = re.compile(r"instar-([ab])(?:\+(\d+)(?:-(\d+))?)?\.efi")
TRIES = 2
TOLD = 80  # characters of a name that are told


class Counting:
    """`variables` are those of the vendor LOADER."""

    name = "systemd-boot"
    copies = 1  # while one gets another name

    def __init__(self, variables: Variables, esp: Path, tries: int = TRIES, disk: Disk = DISK) -> None:
        self._variables, self._esp, self._tries, self._disk = variables, esp, tries, disk

    @staticmethod
    def usable(esp: Path) -> bool:
        """Whether the loader is there and has settings."""
        return (esp / PROGRAM).is_file() and (esp / SETTINGS).is_file()

    def kernel(self, slot: str) -> Path:
        found = self._images().get(slot)
        return found[0] if found else self._esp / FOLDER / f"instar-{slot}.efi"

    # --- looking

    def state(self) -> BootState:
        images, preferred = self._images(), self._preferred()
        drift: tuple[str, ...] = (
            () if not images or preferred in images else ("the preferred slot has no image",)
        )
        first = preferred
        if override := self._override(preferred):
            drift += (f"the loader's own default is {override}, and we left slot {preferred} first",)
            first = self._slot_of(override)
        first = first if first in images else preferred
        names = sorted(images, key=lambda slot: (slot != first, slot))
        once = self._slot_of(_text(self._variables.read("LoaderEntryOneShot")))
        current = self._slot_of(_text(self._variables.read("LoaderEntrySelected")))
        tries = {slot: left for slot, (_, left) in images.items() if left is not None}
        return BootState(tuple(names), once, current, tries, drift)

    def _images(self) -> dict[str, tuple[Path, int | None]]:
        """Slot -> its image and the tries that are left, None where they are not counted."""
        found: dict[str, tuple[Path, int | None]] = {}
        for path, match in self._named():
            if _size(path):
                left = int(match[2]) if match[2] is not None else None
                found.setdefault(match[1], (path, left))
        return found

    def _named(self) -> list[tuple[Path, re.Match[str]]]:
        """All files that are called as images of ours are, those with counted tries first."""
        try:
            paths = sorted((self._esp / FOLDER).iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise failed("read", self._esp / FOLDER, error) from error
        return [(path, match) for path in paths if (match := NAME.fullmatch(path.name))]

    def _preferred(self) -> str:
        for line in self._settings():
            words = line.split()
            if words[:1] == ["default"] and len(words) == 2:
                return self._slot_of(words[1].replace("*", ""))
        return ""

    def _override(self, slot: str) -> str:
        """What the loader takes by its own variable in place of this slot; '' where it has none, or names the slot."""
        name = _text(self._variables.read("LoaderEntryDefault"))[:TOLD]
        return "" if slot and self._slot_of(name) == slot else name

    def _settings(self) -> list[str]:
        try:
            return (self._esp / SETTINGS).read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            return []

    def _slot_of(self, name: str) -> str:
        return next((slot for slot in NAMES if name.startswith(f"instar-{slot}")), "")

    # --- choosing

    def forget(self, slot: str) -> None:
        self._keep_only(slot, None)

    def prepare(self, slot: str) -> None:
        self._known(slot)

    def try_once(self, slot: str) -> None:
        self._call(slot, f"instar-{slot}+{self._tries}-0.efi")
        reach("boot:counted")
        # A pattern: loaders up to systemd 258 know an entry by its whole name, newer ones by that without its numbers.
        self._variables.write("LoaderEntryOneShot", _wide(f"instar-{slot}*"))

    def prefer(self, slot: str, trying: bool = False) -> None:
        self._call(slot, f"instar-{slot}.efi")  # it has passed: its tries are counted no more
        reach("boot:blessed")
        kept = [line for line in self._settings() if line.split()[:1] != ["default"]]
        text = "\n".join([f"default instar-{slot}*", *kept]) + "\n"
        esps.write_small(self._esp / SETTINGS, text.encode(), self._disk)
        reach("boot:default")
        if self._override(slot):
            self._variables.delete("LoaderEntryDefault")
        once = self._slot_of(_text(self._variables.read("LoaderEntryOneShot")))
        if once == other(slot) and not trying:
            self._variables.delete("LoaderEntryOneShot")

    def repair(self) -> list[str]:
        """Second images of a slot are removed, and a preferred slot that has gone is replaced by the other. What
        overrides the preferred one is removed."""
        done = esps.sweep(self._esp / FOLDER, self._disk)
        first = {path for path, _ in self._images().values()}
        for path, _ in self._named():
            if path not in first:
                done.append(f"{esps.remove(path, self._disk)}; it is a second image or none")
        images, preferred = self._images(), self._preferred()
        override = self._override(preferred)
        if images and preferred not in images:
            slot = min(images)
            self.prefer(slot)
            done.append(f"slot {slot} is preferred: slot {preferred or 'that was'} has no image")
        elif images and override:
            self._variables.delete("LoaderEntryDefault")
            done.append(f"put slot {preferred} first again: the loader's own default was {override}")
        return done

    def _call(self, slot: str, name: str) -> None:
        """Have the slot's image under this name, and under no other."""
        path = self._known(slot)
        self._keep_only(slot, path)
        new = path.with_name(name)
        if path != new:
            esps.move(path, new, self._disk)

    def _keep_only(self, slot: str, image: Path | None) -> None:
        for path, match in self._named():
            if match[1] == slot and path != image:
                esps.remove(path, self._disk)

    def _known(self, slot: str) -> Path:
        found = self._images().get(slot)
        if found is None:
            text = f"cannot choose slot {slot}: it has no image in {self._esp / FOLDER}"
            raise MachineError("no-kernel-image", text)
        return found[0]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise failed("read", path, error) from error


def _wide(text: str) -> bytes:
    return f"{text}\0".encode("utf-16-le")


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-16-le", errors="replace").partition("\0")[0]
