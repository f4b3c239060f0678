"""A machine to boot, played from two plain folders: what its firmware and its loader would start next."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any

from instar.host.boot.counting import LOADER, NAME, Counting
from instar.host.boot.efivars import Variables
from instar.host.boot.firmware import FALLBACK, Firmware
from instar.host.boot.loadoption import HardDrive, decode, order, order_bytes

DRIVE = HardDrive(1, 2048, 196_608, bytes(range(16)))
WHOLE = b"a whole kernel image of slot "
CRASHED = 9
MOST_LINES = 4_000
ACTING = ("efivars.py", "firmware.py", "counting.py", "esp.py", "host/files.py")  # the others have no effects


class Machine:
    """`folder` gets the variables, the EFI system partition, and the memory of what we wrote last."""

    def __init__(self, folder: Path) -> None:
        self.esp, efivars = folder / "esp", folder / "efivars"
        for made in (self.esp, efivars):
            made.mkdir(parents=True)
        self.variables = Variables(efivars)
        self.loader_variables = Variables(efivars, LOADER)
        self.memory = folder / "preferred"
        self.firmware = Firmware(self.variables, self.esp, DRIVE, self.memory)

    def put_image(self, slot: str, folder: str = "EFI/instar", name: str = "") -> Path:
        path = self.esp / folder / (name or f"{slot}.efi")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(WHOLE + slot.encode())
        return path

    def counting(self) -> Counting:
        for path, text in (
            ("EFI/systemd/systemd-bootx64.efi", "loader"),
            ("loader/loader.conf", "timeout 0\n"),
        ):
            (self.esp / path).parent.mkdir(parents=True, exist_ok=True)
            (self.esp / path).write_text(text)
        return Counting(self.loader_variables, self.esp)

    # --- what firmware does

    def boot(self) -> str:
        """Start it once: BootNext, then BootOrder, then the fallback image. The slot; '' when nothing starts."""
        once = order(self.variables.read("BootNext") or b"")
        self.variables.delete("BootNext")  # firmware does so before it tries
        for number in [*once, *order(self.variables.read("BootOrder") or b"")]:
            slot = self._starts(number)
            if slot:
                self.variables.write("BootCurrent", order_bytes([number]))
                return slot
        return self._image(self.esp / FALLBACK)

    def _starts(self, number: int) -> str:
        value = self.variables.read(f"Boot{number:04X}")
        if value is None:
            return ""
        option = decode(value)
        if option.drive is not None and option.drive.guid != DRIVE.guid:
            return ""
        return self._image(self.esp / option.path.strip("\\").replace("\\", "/")) if option.path else ""

    def _image(self, path: Path) -> str:
        """The slot whose image lies there, whole; firmware refuses half an image."""
        try:
            data = path.read_bytes()
        except OSError:
            return ""
        slot = data.removeprefix(WHOLE).decode()
        return slot if data.startswith(WHOLE) and slot in ("a", "b") else ""

    # --- what systemd-boot does

    def boot_by_loader(self) -> str:
        """One start by the loader: the entry to try once, else its own default, else that of its settings, else any
        other; tries are counted."""
        once, own = (
            (self.loader_variables.read(f"LoaderEntry{name}") or b"").decode("utf-16-le").rstrip("\0")
            for name in ("OneShot", "Default")
        )
        self.loader_variables.delete("LoaderEntryOneShot")
        settings = (self.esp / "loader/loader.conf").read_text().splitlines()
        default = next((line.split()[1] for line in settings if line.startswith("default ")), "")
        found = {match[1]: (path, match) for path in sorted((self.esp / "EFI/Linux").iterdir())
                 if (match := NAME.fullmatch(path.name))}  # fmt: skip
        # By the whole name, with its numbers, as loaders up to systemd 258 do it.
        wanted = [
            slot for name in (once, own, default) for slot in found if fnmatch(found[slot][0].name, name)
        ]
        good = [slot for slot in found if found[slot][1][2] != "0"]
        for slot in [slot for slot in wanted if slot in good] + sorted(good) + sorted(found):
            path, match = found[slot]
            if match[2] is not None and int(match[2]) > 0:
                left, done = int(match[2]) - 1, int(match[3] or 0) + 1
                path = path.rename(path.with_name(f"instar-{slot}+{left}-{done}.efi"))
            if image := self._image(path):
                return image
        return ""


def crashed_at_every_line(make: Callable[[], Machine], act: Callable[[Machine], Any]) -> list[Machine]:
    """Machines, each with `act` cut off right before another line of Python that may have an effect: a
    superset of every system call.

    The process is gone at once, as by SIGKILL; the last machine is the one on which it ran to its end.
    """
    machines = []
    for line in range(MOST_LINES):
        machine = make()
        machines.append(machine)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _act_until(line, machine, act)
                status = 0
            finally:
                os._exit(status)
        if (status := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) == 0:
            return machines
        assert status == CRASHED, "the act itself failed"
    raise AssertionError(f"the act has more than {MOST_LINES} lines")


def _act_until(line: int, machine: Machine, act: Callable[[Machine], Any]) -> None:
    left = line

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(ACTING):
            return None
        if event == "line":
            if left == 0:
                os._exit(CRASHED)
            left -= 1
        return trace

    sys.settrace(trace)
    try:
        act(machine)
    finally:
        sys.settrace(None)
