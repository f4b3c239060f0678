"""What must be true of a machine that was given a system which does not do: seen from all sides."""

from __future__ import annotations

import json
from typing import Any

from instar_lab.osimage.disk import AT_MIB, MIB
from instar_lab.osimage.variant import Image
from tests.os.vm import oracles
from tests.os.vm.world import Machine, X

RESET_S = 400.0  # the watchdog's 60 s, and the way up; times six of what is idle


def comes_back(machine: Machine, order: dict[str, Any], code: str, version: str = X) -> dict[str, Any]:
    """The firmware starts `version` again, and the order ends for `code`; the order."""
    machine.up(version)
    machine.connected(order["made"])
    ended = machine.ended(order)
    assert (ended["outcome"], ended["code"]) == ("reverted", code), f"{ended}\n{machine.words()}"
    last = [entry for entry in machine.history() if entry["line"] == "os"][-1]
    assert (last["phase"], last["version"]) == ("reverted", order["version"]), last
    return ended


def is_kept_out(machine: Machine, order: dict[str, Any]) -> None:
    """On the node: the version is in quarantine, the slot known as bad; the boot order is as it was."""
    system = machine.reported(lambda seen: seen["slots"]["b"]["state"] == "bad", "slot b that is bad")
    assert (system["running"], system["boot"]["order"], system["boot"]["once"]) == ("a", ["a", "b"], ""), (
        system
    )
    entries = json.loads(machine.do("cat /data/instar/quarantine.json"))
    assert order["digest"] in json.dumps(entries), entries


def starts_from_a(machine: Machine, image: Image, kernel_b: str = "") -> None:
    """The variables, the EFI system partition and slot A, read from outside. `kernel_b`: the version in b."""
    machine.settle()
    firmware, esp = oracles.Firmware.of(machine.vm.variables), oracles.Esp(machine.disk)
    assert firmware.once == "", firmware
    assert firmware.slots in ("ab", "a"), firmware
    assert esp.kernel("EFI/instar/a.efi").version == image.version
    assert esp.kernel(oracles.FALLBACK).version == image.version
    assert oracles.holds(machine.disk, "a", image.root)
    if kernel_b:
        assert esp.kernel("EFI/instar/b.efi").version == kernel_b


def flip(machine: Machine, slot: str, at: int) -> None:
    """One bit of a slot of a machine that is off."""
    with machine.disk.open("r+b") as file:
        file.seek(AT_MIB[slot] * MIB + at)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes((byte ^ 0x10,)))
