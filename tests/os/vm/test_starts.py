"""How the lab's system comes up without any update: from the factory, by kexec, past a kernel that hangs, signed.

Systemd-boot, entries that are lost later, and signed updates are in files of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.os.vm import oracles, stores
from tests.os.vm.world import Machine, World, X

pytestmark = [pytest.mark.os, pytest.mark.slow, pytest.mark.xdist_group("vm-starts")]

HANGS = "EFI/lab/hangs.efi"
REFUSED_S = 180.0
INSTAR = "python3 -I -S /data/instar/launcher/instar.pyz"


def test_from_the_factory_by_kexec_and_past_a_kernel_that_hangs(machine: Machine, world: World) -> None:
    machine.put(HANGS, world.broken("hangs-early").kernel)
    machine.start()
    node = world.server.api.get(f"/nodes/{machine.id}")
    assert node["agent"]["version"] == "1.0.0", node

    jump(machine, "EFI/instar/a.efi")
    machine.up(X, "kexec")
    machine.connected()

    # It has no driver yet: only the watchdog that the kernel before it has started can end it.
    jump(machine, HANGS)
    machine.wait("LAB hangs early")
    machine.up(X, "firmware")
    machine.power_off()
    assert any("LAB down" in line for line in machine.vm.lines()[-3:]), machine.words()
    assert oracles.Firmware.of(machine.vm.variables).slots == "a"

    stores.lost(machine.vm.variables)
    machine.start()
    machine.wait("made the entry of slot a again")
    assert machine.versions() == [f"{X} firmware", f"{X} kexec", f"{X} firmware", f"{X} firmware"]
    machine.power_off()
    assert oracles.Firmware.of(machine.vm.variables).slots == "a"
    esp = oracles.Esp(machine.disk)
    assert [esp.kernel(path).version for path in ("EFI/instar/a.efi", oracles.FALLBACK)] == [X, X]
    assert oracles.holds(machine.disk, "a", world.image(X).root)


def test_secure_boot_starts_nothing_that_is_not_signed(
    machines: Callable[..., Machine], world: World
) -> None:
    machine = machines(world.image(X), secure=True)
    assert not oracles.Esp(machine.disk).kernel(oracles.FALLBACK).signed
    machine.power_on()
    machine.wait("Access Denied", REFUSED_S)
    machine.cut_power()
    assert machine.versions() == []

    signed = world.image(X, signed=True)
    machine.put(oracles.FALLBACK, signed.kernel)
    assert oracles.Esp(machine.disk).kernel(oracles.FALLBACK).signed
    machine.start()
    assert "Secure boot enabled" in machine.do("dmesg")
    assert machine.versions() == [f"{X} firmware"]


def jump(machine: Machine, image: str) -> None:
    """Into a kernel image of the EFI system partition, by the node's own one-shot children."""
    machine.since = machine.mark
    machine.do(f"{INSTAR} boot load --image /efi/{image} --slot a")
    machine.do(f"(sleep 1; {INSTAR} boot jump) </dev/null >/dev/null 2>&1 &")
