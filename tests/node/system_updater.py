"""A real updater in a process of its own, on a machine that is played below its two slots.

`python -m tests.node.system_updater PROGRAM MACHINE --state DIR`: all of the updater is real, and so are disk image,
EFI variables and EFI system partition, as files in the folder MACHINE. What the kernel would say of the mounted
root, and the machine's way down, are files there, too (Machine in system_host.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

from instar.host.clock import Clock
from instar.updater.main import main
from instar.updater.slots import Around


class PlayedClock(Clock):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def boot_id(self) -> str:
        return (self._folder / "boot_id").read_text()

    def booted(self) -> float:
        return self.boottime() - (self.wall() - (self._folder / "boot_id").stat().st_mtime)


class Written:
    """The last call of all, written down in place of being made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def reboot(self) -> None:
        (self._folder / "down").write_text("reboot")

    def kexec(self) -> None:
        (self._folder / "down").write_text("kexec")


def around(folder: Path) -> Around:
    return Around(
        folder / "efivars", folder / "mounts", folder / "devices", folder / "cmdline", Written(folder),
        PlayedClock(folder),
    )  # fmt: skip


if __name__ == "__main__":
    program, machine = sys.argv[1:3]
    sys.argv[0] = program
    sys.exit(main(sys.argv[3:], around(Path(machine))))
