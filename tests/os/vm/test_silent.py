"""Systems that come up, and in which nobody answers: without the agent, and without any of our programs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.os.vm.falls import comes_back, is_kept_out, starts_from_a
from tests.os.vm.world import Machine, World, X, settings

pytestmark = [pytest.mark.os, pytest.mark.slow, pytest.mark.xdist_group("vm-silent")]
LEASE_S, GUARD_S = 30.0, 15.0
LATER = "busybox sed -i 's/^guard_s.*/guard_s = 3600.0/' /data/instar/config.toml"
LEFT_S = 600.0


def test_the_guard_leaves_what_has_no_updater_and_the_updater_what_has_no_agent(
    machines: Callable[..., Machine], world: World
) -> None:
    """By the firmware, then by kexec."""
    machine = machines(world.image(X), config=settings(LEASE_S, LEASE_S, guard_s=GUARD_S))
    machine.start()
    bad = world.broken("no-node")
    order = machine.update_os(world.publish(bad), "reboot")
    machine.up(bad.version)
    machine.wait("is undecided after", LEFT_S)
    comes_back(machine, order, "fell-back")
    is_kept_out(machine, order)

    machine.do(LATER)  # the updater would be too late on a busy host
    bad = world.broken("no-agent")
    order = machine.update_os(world.publish(bad), "kexec")
    machine.appears(bad.version, "kexec")
    machine.wait("LAB going down", LEFT_S)
    ended = comes_back(machine, order, "lease-lapsed")
    assert "does not answer" in ended["text"], ended
    is_kept_out(machine, order)
    machine.power_off()
    starts_from_a(machine, world.image(X), kernel_b=bad.version)
    assert machine.versions()[-1] == f"{X} firmware"
