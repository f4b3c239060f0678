"""The machine's two slots as its settings name them, with the kernel's calls made by one-shot children.

Imported on nodes that have slots only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from instar.core.errors import InputError, MachineError
from instar.core.settings import OsSettings
from instar.host.boot import efivars, running
from instar.host.boot.finding import find, hardware, machine
from instar.host.boot.going_down import GoingDown
from instar.host.children import run_program
from instar.host.clock import Clock
from instar.host.layout import Layout
from instar.targets.slots.platform import Platform, Power

KEXEC_S = 60.0  # for the kernel to take an image
MEMORY = "os/preferred"  # below the state folder: the slot that we put first last


class Around(NamedTuple):
    """Where the machine tells of itself, and how it goes down; a test has its own."""

    efivars: Path = efivars.FOLDER
    mounts: Path = running.MOUNTS
    devices: Path = running.DEVICES
    line: Path = running.LINE
    power: Power | None = None  # None: the real one
    clock: Clock = Clock()


class Kexec:
    """Implements `instar.targets.slots.platform.Kexec` by children of the program that `program` names."""

    def __init__(self, program: Callable[[], Path]) -> None:
        self._program = program

    def load(self, image: Path, slot: str) -> None:
        self._do("load", "--image", str(image), "--slot", slot)

    def unload(self) -> None:
        self._do("unload")

    def jump(self) -> None:
        """Into the loaded kernel, at once: returns only by a MachineError."""
        self._do("jump")
        raise MachineError("kexec-refused", "cannot go into the loaded kernel: the call came back")

    def _do(self, *words: str) -> None:
        ended = run_program(self._program(), ["boot", *words], KEXEC_S)
        try:
            said: Any = json.loads(ended.stdout)
            if said["ok"]:
                return
            code, text = str(said["error"]["code"]), str(said["error"]["text"])
        except (ValueError, KeyError, TypeError):
            code, text = "kexec-refused", ended.describe("the kexec child")
        raise MachineError(code, text)


def restart(around: Around | None = None) -> None:
    """Ask for the machine's way down, whatever is known of its slots. Raises MachineError `no-reboot`."""
    power = around.power if around else None
    (power or GoingDown(_never)).reboot()


def _never() -> None:
    raise MachineError("kexec-refused", "a restart does not use kexec")


def open_platform(
    settings: OsSettings,
    layout: Layout,
    program: Callable[[], Path],
    around: Around | None = None,
) -> Platform:
    """What `[os]` names, as it is now. Changes nothing.

    Raises InputError `no-slots` when it names nothing; MachineError with the cause when that is not there.
    """
    around = around or Around()
    if not settings.disk:
        raise InputError(
            "no-slots",
            "cannot update the system: this node has no slots; os.disk of its config.toml names none",
        )
    esp, kexec = Path(settings.esp), Kexec(program)
    names = (settings.slots[0], settings.slots[1])
    if not esp.is_dir():
        raise MachineError(
            "no-esp", f"cannot use {esp}: expected the EFI system partition to be mounted there"
        )
    try:
        found = find(Path(settings.disk), names, esp, layout.state / MEMORY, around.efivars)
    except OSError as error:
        raise MachineError("disk-failed", f"cannot look at {settings.disk}: {error.strerror}") from None
    return Platform(
        found.slots,
        found.boot,
        esp,
        kexec,
        around.power or GoingDown(kexec.jump),
        hardware(settings.hardware),
        machine(),
        lambda: running.running(found.slots.values(), around.mounts, around.devices),
        lambda: running.booted_by(around.line),
    )
