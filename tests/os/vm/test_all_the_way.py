"""Requirement O5, the long run: X installs Y, which installs Z, all by reboot and all by kexec."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.os.vm import oracles
from tests.os.vm.world import Machine, World, X, Y, Z

pytestmark = pytest.mark.os
UNSEEN = "confirmed, cold boot not seen"


def is_good(slot: str, system: dict[str, Any]) -> bool:
    return bool(system["slots"][slot]["state"] == "good")


def stands(machine: Machine, order: str, a: str, b: str) -> None:
    """Seen from outside: the boot order, nothing that is tried once, whole systems of these versions in both slots."""
    machine.settle()
    firmware, esp = oracles.Firmware.of(machine.vm.variables), oracles.Esp(machine.disk)
    assert (firmware.slots, firmware.once) == (order, ""), firmware
    assert esp.kernel(oracles.FALLBACK).version == (a if order[0] == "a" else b)
    for slot, version in (("a", a), ("b", b)):
        assert esp.kernel(f"EFI/instar/{slot}.efi").version == version
        assert oracles.holds(machine.disk, slot, machine.world.image(version).root)


@pytest.mark.xdist_group("vm-x")
def test_by_reboot(from_x: Machine, world: World) -> None:
    machine = from_x
    for version, running in ((Y, "b"), (Z, "a")):
        order = machine.update_os(world.publish(world.image(version)), "reboot")
        machine.up(version)
        ended = machine.ended(order)
        assert (ended["outcome"], ended["slot"]) == ("confirmed", running), ended
        system = machine.reported(partial(is_good, running), f"slot {running} that is good")
        assert (system["running"], system["boot"]["order"][0]) == (running, running)
    stands(machine, "ab", a=Z, b=Y)
    assert machine.versions() == [f"{version} firmware" for version in (Y, Z)]


@pytest.mark.xdist_group("vm-kexec")
def test_by_kexec_overridden_once_and_then_proven(machine: Machine, world: World) -> None:
    """Z goes over the only slot that the firmware was seen to start, as ordered. Then the proof is given."""
    y, z = (world.publish(world.image(version)) for version in (Y, Z))
    machine.start()
    order = machine.update_os(y, "kexec")
    machine.up(Y, "kexec")
    assert machine.ended(order)["outcome"] == UNSEEN

    before = oracles.slot_digest(machine.disk, "a", 1 << 20)
    refused = machine.ended(machine.update_os(z, "kexec"))
    assert (refused["outcome"], refused["code"]) == ("failed-precondition", "cold-boot-not-seen"), refused
    assert oracles.slot_digest(machine.disk, "a", 1 << 20) == before

    order = machine.update_os(z, "kexec", override_cold_boot=True)
    machine.up(Z, "kexec")
    assert machine.ended(order)["outcome"] == UNSEEN
    machine.settle()
    assert oracles.Firmware.of(machine.vm.variables).once == "\\EFI\\instar\\a.efi"

    machine.cold_boot()
    machine.up(Z)
    machine.reported(lambda seen: seen["slots"]["a"]["cold_boot_seen"], "a cold boot that was seen")
    machine.power_off()
    stands(machine, "ab", a=Z, b=Y)
    assert machine.versions() == [f"{X} firmware", f"{Y} kexec", f"{Z} kexec", f"{Z} firmware"]
