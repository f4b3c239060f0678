"""A system whose process 1 does nothing: the watchdog resets it, after kexec too, and the old one comes back."""

from __future__ import annotations

import pytest

from tests.os.vm.falls import RESET_S, comes_back, is_kept_out, starts_from_a
from tests.os.vm.world import Machine, World, X, Y

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("vm-hangs")]


def test_hangs_after_boot_next_and_after_kexec_then_takes_a_sound_one(machine: Machine, world: World) -> None:
    bad = world.broken("hangs")
    bundle = world.publish(bad)
    machine.start()
    for activation, via in (("reboot", "firmware"), ("kexec", "kexec")):
        order = machine.update_os(bundle, activation)
        machine.appears(bad.version, via)
        machine.wait("LAB up ", RESET_S)
        comes_back(machine, order, "fell-back")
        is_kept_out(machine, order)
    machine.power_off()
    starts_from_a(machine, world.image(X))

    machine.start()
    order = machine.update_os(world.publish(world.image(Y)), "kexec")
    machine.up(Y, "kexec")
    assert machine.ended(order)["outcome"] == "confirmed, cold boot not seen"
    assert machine.versions()[1:5] == [
        f"{bad.version} firmware",
        f"{X} firmware",
        f"{bad.version} kexec",
        f"{X} firmware",
    ]
