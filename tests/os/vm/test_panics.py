"""A system whose process 1 ends at once: the kernel panics, and the firmware starts the old one. By both ways."""

from __future__ import annotations

import pytest

from tests.os.vm.falls import comes_back, is_kept_out, starts_from_a
from tests.os.vm.world import Machine, World, X

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("vm-x")]


def test_a_panic_after_boot_next_then_one_after_kexec(on_x: Machine, world: World) -> None:
    machine, bad = on_x, world.broken("panics")
    bundle = world.publish(bad)
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
    assert machine.versions() == tried
    starts_from_a(machine, world.image(X))
