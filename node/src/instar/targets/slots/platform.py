"""The machine's side of a system update, handed in by whoever wires: nothing here is made by a target itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from instar.host.boot.slots import Boot, Slot
from instar.host.boot.watchdog import Watchdog


class SystemProgress(NamedTuple):
    """How far the image of transaction `tx` is in `slot`: `done` of `total` bytes of the root image are there (while
    it is verified: read back), of which `reused` came from the running slot; `fetched` bytes came over the network."""

    tx: str
    slot: str
    done: int
    total: int
    fetched: int
    reused: int


Tell = Callable[[SystemProgress], None]


def untold(_: SystemProgress) -> None:
    return


class Kexec(Protocol):
    """Raises MachineError `kexec-refused`."""

    def load(self, image: Path, slot: str) -> None: ...

    def unload(self) -> None: ...


class Power(Protocol):
    """The machine goes down in good order some time after the call returns."""

    def reboot(self) -> None: ...

    def kexec(self) -> None:
        """Into the kernel that is loaded."""


class Platform(NamedTuple):
    """`hardware` are the names that this machine answers to, the most exact first. `running` tells the slot that is
    mounted as root, '' when it is none of the two; `booted_by` says firmware or kexec."""

    slots: dict[str, Slot]
    boot: Boot
    esp: Path
    kexec: Kexec
    power: Power
    hardware: tuple[str, ...]
    arch: str
    running: Callable[[], str]
    booted_by: Callable[[], str]
    watchdog: Watchdog = Watchdog()
    os_release: Path = Path("/etc/os-release")
