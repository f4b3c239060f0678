"""The firmware's variables are a cache: a machine whose firmware has lost or disarranged them starts a whole system,
and the node puts them in order again."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest

from tests.os.vm import oracles, stores
from tests.os.vm.world import Machine, World, Y, Z

pytestmark = pytest.mark.os

FOREIGN, STALE = "Somebody else's system", "Instar slot C"


class Slots(NamedTuple):
    """Of a machine with two good systems: the one that runs and is preferred, and the other."""

    runs: str
    other: str
    version: str  # that runs
    others: str

    @classmethod
    def of(cls, machine: Machine) -> Slots:
        system = machine.system()
        runs = system["running"]
        (other,) = set(system["slots"]) - {runs}
        return cls(runs, other, *(system["slots"][slot]["version"] for slot in (runs, other)))

    @property
    def entries(self) -> list[str]:
        return [rf"\EFI\instar\{slot}.efi" for slot in (self.runs, self.other)]


@pytest.mark.xdist_group("vm-x")
def test_lost_and_disarranged_entries_are_made_again(on_two: Machine, world: World) -> None:
    slots = Slots.of(on_two)
    all_is_lost(on_two, slots)
    some_are_disarranged(on_two, slots)


def all_is_lost(machine: Machine, slots: Slots) -> None:
    """The fallback loader starts the slot that was preferred: the first image of all is in no slot's place."""
    machine.power_off()
    assert oracles.Firmware.of(machine.vm.variables).slots == slots.runs + slots.other
    stores.lost(machine.vm.variables)
    machine.start(slots.version)
    boot = put_right(machine, slots, slots.runs)
    for slot in "ab":
        assert f"made the entry of slot {slot} again" in boot["drift"], boot
    machine.power_off()
    assert oracles.Esp(machine.disk).kernel(oracles.FALLBACK).version == slots.version
    starts(machine, slots)


def some_are_disarranged(machine: Machine, slots: Slots) -> None:
    """The entry of the slot that is preferred is gone: the other system comes up, puts it first again, and the next
    boot is of that one."""
    before = set(oracles.Firmware.of(machine.vm.variables).order)
    stores.disarranged(machine.vm.variables, slots.entries[0], FOREIGN, STALE)
    assert oracles.Firmware.of(machine.vm.variables).slots == slots.other
    machine.start(slots.others)
    boot = put_right(machine, slots, slots.other)
    assert any("removed our stale entry" in each for each in boot["drift"]), boot
    machine.reboot(slots.version)
    machine.power_off()
    starts(machine, slots)
    firmware = oracles.Firmware.of(machine.vm.variables)
    assert set(firmware.order) == before | {r"\EFI\OTHER\OTHER.EFI"}, firmware  # others' stay, behind ours
    assert not any("c.efi" in each for each in firmware.entries.values()), firmware


@pytest.mark.slow
@pytest.mark.xdist_group("vm-lost")
def test_all_is_lost_in_a_trial(machine: Machine, world: World) -> None:
    """Z has come up, and nobody has decided yet: what the firmware falls back to is Y, and Y it remains."""
    machine.start()
    assert machine.ended(machine.update_os(world.publish(world.image(Y)), "reboot"))["outcome"] == "confirmed"
    slots = Slots("b", "a", Y, Z)
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
    starts(machine, slots)
    machine.start(Y)


def put_right(machine: Machine, slots: Slots, running: str) -> dict[str, Any]:
    """What the node tells of its boot entries once it has made that of the preferred slot again."""
    again = f"made the entry of slot {slots.runs} again"
    system = machine.reported(
        lambda seen: seen["running"] == running and again in seen["boot"]["drift"],
        "boot entries that are made again",
    )
    assert system["boot"]["order"] == [slots.runs, slots.other], system
    return dict(system["boot"])


def starts(machine: Machine, slots: Slots) -> None:
    """With the machine off: the preferred slot, by its entry and by the fallback."""
    firmware, esp = oracles.Firmware.of(machine.vm.variables), oracles.Esp(machine.disk)
    assert (firmware.slots, firmware.once) == (slots.runs + slots.other, ""), firmware
    assert firmware.order[:2] == slots.entries, firmware
    for path in (f"EFI/instar/{slots.runs}.efi", oracles.FALLBACK):
        assert esp.kernel(path).version == slots.version
    assert oracles.holds(machine.disk, slots.runs, machine.world.image(slots.version).root)
