"""A system whose process 1 ends at once: the kernel panics, and the firmware starts the old one. By both ways."""

from __future__ import annotations

import pytest

from tests.os.vm import oracles
from tests.os.vm.falls import comes_back, is_kept_out, starts_from_a
from tests.os.vm.world import Machine, World, X, Y

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("vm-panics")]


def test_a_panic_after_boot_next_then_one_after_kexec_then_a_sound_one(
    machine: Machine, world: World
) -> None:
    bad = world.broken("panics")
    bundle = world.publish(bad)
    machine.start()
    order = machine.update_os(bundle, "reboot")
    machine.appears(bad.version)
    comes_back(machine, order, "fell-back")
    is_kept_out(machine, order)

    # Nobody tries it again but whoever orders it anew.
    again = machine.update_os(bundle, "kexec")
    assert again["generation"] > order["generation"]
    machine.appears(bad.version, "kexec")
    machine.wait("Kernel panic", since=machine.since)
    comes_back(machine, again, "fell-back")
    is_kept_out(machine, again)
    tried = [f"{bad.version} firmware", f"{X} firmware", f"{bad.version} kexec", f"{X} firmware"]
    assert machine.versions() == [f"{X} firmware", *tried]
    machine.power_off()
    starts_from_a(machine, world.image(X))

    y = world.image(Y)
    machine.start()
    order = machine.update_os(world.publish(y), "reboot")
    machine.up(Y)
    assert machine.ended(order)["outcome"] == "confirmed"
    machine.power_off()
    assert oracles.Firmware.of(machine.vm.variables).slots == "ba"
    assert oracles.Esp(machine.disk).kernel("EFI/instar/b.efi").version == Y
    assert oracles.holds(machine.disk, "b", y.root)
