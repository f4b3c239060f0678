"""A system whose process 1 does nothing: the watchdog resets it, after kexec too, and the old one comes back."""

from __future__ import annotations

import pytest

from tests.os.vm.falls import RESET_S, comes_back, is_kept_out, starts_from_a
from tests.os.vm.world import Machine, World, X

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("vm-x")]


@pytest.mark.parametrize(
    ("activation", "via"), [("kexec", "kexec"), pytest.param("reboot", "firmware", marks=pytest.mark.slow)]
)
def test_one_that_hangs_is_reset(on_x: Machine, world: World, activation: str, via: str) -> None:
    machine, bad = on_x, world.broken("hangs")
    order = machine.update_os(world.publish(bad), activation)
    machine.appears(bad.version, via)
    machine.wait("LAB up ", RESET_S)
    comes_back(machine, order, "fell-back")
    is_kept_out(machine, order)
    starts_from_a(machine, world.image(X))
    assert machine.versions() == [f"{bad.version} {via}", f"{X} firmware"]
