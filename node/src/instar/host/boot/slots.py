"""The two slots of a node's system, and what every way of choosing between them offers.

A slot is a partition (or, in tests and benchmarks, a plain file) for the root image, and a unified kernel image
in the EFI system partition. Which one runs is known from the mounted root alone (`running`): BootCurrent and
the loader's variables are stale after kexec.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

NAMES = ("a", "b")


class Slot(NamedTuple):
    """`size` is the room for the root image in bytes; `offset` is where it begins in `device`."""

    name: str
    device: Path
    offset: int
    size: int


class BootState(NamedTuple):
    """What the firmware, or the loader on the disk, would do. Slots by name; '' where it is none of ours."""

    order: tuple[str, ...]  # our slots in the order in which a cold boot takes them
    once: str  # the slot that the next boot tries once
    current: str  # what the firmware says it started; stale after kexec
    tries: dict[str, int]  # slot -> tries left, where they are counted
    drift: tuple[str, ...]  # in words: what is not as we left it


def other(slot: str) -> str:
    """The slot beside this one."""
    return NAMES[1 - NAMES.index(slot)]


class Boot(Protocol):
    """Every method is idempotent, writes only what changes, and reads back what it wrote.

    Raises MachineError when the firmware or the disk does not do it; nothing is then worse than before.
    """

    name: str
    copies: int  # images that there must be room for beside the two slots', while one is chosen

    def kernel(self, slot: str) -> Path:
        """Where a slot's kernel image lies, or is to be put."""

    def state(self) -> BootState: ...

    def forget(self, slot: str) -> None:
        """Remove the slot's kernel images, durably: what is about to be overwritten must not start any more."""

    def prepare(self, slot: str) -> None:
        """All of `try_once` that does not change yet what starts: shows that the firmware takes it."""

    def try_once(self, slot: str) -> None:
        """The next boot by firmware is of this slot, once; the one after it is as before."""

    def prefer(self, slot: str, trying: bool = False) -> None:
        """Every boot by firmware is of this slot, and of the other one only when this one cannot be started.
        `trying`: the other one stays the one that is tried next, if it is that."""

    def repair(self) -> list[str]:
        """Bring back what firmware or people have lost or changed of ours; what was done, in words."""
