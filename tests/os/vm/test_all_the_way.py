"""Requirement O5, the long run: X installs Y, which installs Z, all by reboot and all by kexec."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.os.vm import oracles
from tests.os.vm.world import Machine, World, X, Y, Z

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("vm-all-the-way")]
UNSEEN = "confirmed, cold boot not seen"


def is_good(slot: str, system: dict[str, Any]) -> bool:
    return bool(system["slots"][slot]["state"] == "good")


def stands(machine: Machine, order: str, a: str, b: str, once: str = "") -> None:
    """With the machine off: the boot order, what is tried `once`, whole systems of these versions in both slots."""
    firmware, esp = oracles.Firmware.of(machine.vm.variables), oracles.Esp(machine.disk)
    assert (firmware.slots, firmware.once) == (order, once and f"\\EFI\\instar\\{once}.efi"), firmware
    assert esp.kernel(oracles.FALLBACK).version == (a if order[0] == "a" else b)
    for slot, version in (("a", a), ("b", b)):
        assert esp.kernel(f"EFI/instar/{slot}.efi").version == version
        assert oracles.holds(machine.disk, slot, machine.world.image(version).root)


def test_by_reboot(machine: Machine, world: World) -> None:
    machine.start()
    for version, running in ((Y, "b"), (Z, "a")):
        order = machine.update_os(world.publish(world.image(version)), "reboot")
        machine.up(version)
        ended = machine.ended(order)
        assert (ended["outcome"], ended["slot"]) == ("confirmed", running), ended
        system = machine.reported(partial(is_good, running), f"slot {running} that is good")
        assert (system["running"], system["boot"]["order"][0]) == (running, running)
    machine.power_off()
    stands(machine, "ab", a=Z, b=Y)
    machine.start(Z)
    assert machine.versions() == [f"{version} firmware" for version in (X, Y, Z, Z)]


def test_by_kexec_overridden_once_and_proven_once(machine: Machine, world: World) -> None:
    """Z goes over the only slot that the firmware was seen to start, as ordered. Then the proof is given first."""
    x, y, z = (world.publish(world.image(version)) for version in (X, Y, Z))
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

    machine.cold_boot()
    machine.up(Z)
    machine.reported(lambda seen: seen["slots"]["a"]["cold_boot_seen"], "a cold boot that was seen")
    order = machine.update_os(x, "kexec")
    machine.up(X, "kexec")
    assert machine.ended(order)["outcome"] == UNSEEN
    machine.power_off()
    stands(machine, "ab", a=Z, b=X, once="b")
    machine.start(X)  # the one try of the firmware that a confirmed one has
    machine.reported(lambda seen: seen["slots"]["b"]["cold_boot_seen"], "a cold boot that was seen")
    assert machine.versions() == [
        f"{X} firmware", f"{Y} kexec", f"{Z} kexec", f"{Z} firmware", f"{X} kexec", f"{X} firmware",
    ]  # fmt: skip
