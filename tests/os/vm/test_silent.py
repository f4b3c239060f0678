"""Systems that come up, and in which nobody answers: without the agent, and without any of our programs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.os.vm.falls import comes_back, is_kept_out, starts_from_a
from tests.os.vm.world import Machine, World, X, settings

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("vm-silent")]
LEASE_S = 30.0
LEFT_S = 600.0


def test_the_updater_puts_back_what_has_no_agent_and_the_guard_what_has_no_updater(
    machines: Callable[..., Machine], world: World
) -> None:
    """By kexec, then by the firmware."""
    machine = machines(world.image(X), config=settings(LEASE_S, LEASE_S))
    machine.start()
    bad = world.broken("no-agent")
    order = machine.update_os(world.publish(bad), "kexec")
    machine.appears(bad.version, "kexec")
    machine.wait("LAB going down", LEFT_S)
    ended = comes_back(machine, order, "lease-lapsed")
    assert "does not answer" in ended["text"], ended
    is_kept_out(machine, order)

    bad = world.broken("no-node")
    order = machine.update_os(world.publish(bad), "reboot")
    machine.up(bad.version)
    machine.wait("is undecided after", LEFT_S)
    comes_back(machine, order, "fell-back")
    is_kept_out(machine, order)
    machine.power_off()
    starts_from_a(machine, world.image(X), kernel_b=bad.version)
    assert machine.versions()[-1] == f"{X} firmware"
