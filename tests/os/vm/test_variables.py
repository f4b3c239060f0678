"""The firmware's variables are a cache: a machine whose firmware has lost or disarranged them starts a whole system,
and the node puts them in order again. On one machine, one thing after the other."""

from __future__ import annotations

import json
from typing import Any

import pytest

from instar_lab.osimage.variant import Image
from tests.os.vm import oracles, stores
from tests.os.vm.world import Machine, World, X, Y, Z

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("vm-variables")]

FOREIGN, STALE = "Somebody else's system", "Instar slot C"


def test_lost_and_disarranged_entries_are_made_again(machine: Machine, world: World) -> None:
    y = world.image(Y)
    machine.start()
    assert machine.ended(machine.update_os(world.publish(y), "reboot"))["outcome"] == "confirmed"
    all_is_lost(machine, y)
    some_are_disarranged(machine, y)
    all_is_lost_in_a_trial(machine, world, y)


def all_is_lost(machine: Machine, y: Image) -> None:
    """The fallback loader starts the slot that was preferred: the first image of all is in no slot's place."""
    machine.power_off()
    assert oracles.Firmware.of(machine.vm.variables).slots == "ba"
    stores.lost(machine.vm.variables)
    machine.start(Y)
    boot = put_right(machine, "b")
    for slot in "ab":
        assert f"made the entry of slot {slot} again" in boot["drift"], boot
    machine.power_off()
    assert oracles.Esp(machine.disk).kernel(oracles.FALLBACK).version == Y
    starts_from_b(machine, y)


def some_are_disarranged(machine: Machine, y: Image) -> None:
    """Slot B's entry is gone: the other system comes up, puts it first again, and the next boot is of B."""
    before = set(oracles.Firmware.of(machine.vm.variables).order)
    stores.disarranged(machine.vm.variables, r"\EFI\instar\b.efi", FOREIGN, STALE)
    assert oracles.Firmware.of(machine.vm.variables).slots == "a"
    machine.start(X)
    boot = put_right(machine, "a")
    assert any("removed our stale entry" in each for each in boot["drift"]), boot
    machine.reboot(Y)
    machine.power_off()
    starts_from_b(machine, y)
    firmware = oracles.Firmware.of(machine.vm.variables)
    assert set(firmware.order) == before | {r"\EFI\OTHER\OTHER.EFI"}, firmware  # others' stay, behind ours
    assert not any("c.efi" in each for each in firmware.entries.values()), firmware


def all_is_lost_in_a_trial(machine: Machine, world: World, y: Image) -> None:
    """Z has come up, and nobody has decided yet: what the firmware falls back to is Y, and Y it remains."""
    machine.start(Y)
    order = machine.update_os(world.publish(world.image(Z)), "reboot")
    machine.appears(Z)
    machine.cut_power()
    stores.lost(machine.vm.variables)
    machine.start(Y)
    ended = machine.ended(order)
    assert (ended["outcome"], ended["code"]) == ("reverted", "fell-back"), ended
    assert order["digest"] in json.dumps(json.loads(machine.do("cat /data/instar/quarantine.json")))
    system = machine.reported(lambda seen: seen["slots"]["a"]["state"] == "bad", "slot a that is bad")
    assert (system["running"], system["boot"]["order"]) == ("b", ["b", "a"]), system
    machine.power_off()
    starts_from_b(machine, y)
    machine.start(Y)


def put_right(machine: Machine, running: str) -> dict[str, Any]:
    """What the node tells of its boot entries once it has made that of slot B again."""
    again = "made the entry of slot b again"
    system = machine.reported(
        lambda seen: seen["running"] == running and again in seen["boot"]["drift"],
        "boot entries that are made again",
    )
    assert system["boot"]["order"] == ["b", "a"], system
    return dict(system["boot"])


def starts_from_b(machine: Machine, y: Image) -> None:
    """With the machine off."""
    firmware, esp = oracles.Firmware.of(machine.vm.variables), oracles.Esp(machine.disk)
    assert (firmware.slots, firmware.once) == ("ba", ""), firmware
    assert firmware.order[:2] == [r"\EFI\instar\b.efi", r"\EFI\instar\a.efi"], firmware
    for path in ("EFI/instar/b.efi", oracles.FALLBACK):
        assert esp.kernel(path).version == y.version
    assert oracles.holds(machine.disk, "b", y.root)
