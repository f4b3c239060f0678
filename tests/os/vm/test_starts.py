"""How the lab's system comes up: by its fallback, under Secure Boot, under systemd-boot, by kexec."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.os.vm import oracles, stores
from tests.os.vm.world import Machine, World, X

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("vm-starts")]

REFUSED_S = 180.0
INSTAR = "python3 -I -S /data/instar/launcher/instar.pyz"


def jump(machine: Machine, image: str, slot: str = "a") -> None:
    """Into a kernel image of the ESP, by the node's own one-shot children."""
    machine.since = machine.mark
    machine.do(f"{INSTAR} boot load --image /efi/{image} --slot {slot}")
    machine.do(f"(sleep 1; {INSTAR} boot jump) </dev/null >/dev/null 2>&1 &")


def test_a_machine_enrols_and_says_hello(machine: Machine) -> None:
    machine.start()
    node = machine.world.server.api.get(f"/nodes/{machine.id}")
    assert node["agent"]["version"] == "1.0.0", node
    assert machine.versions() == [f"{X} firmware"]

    machine.power_off()
    assert any("LAB down" in line for line in machine.vm.lines()[-3:]), machine.words()
    esp = oracles.Esp(machine.disk)
    assert esp.kernel("EFI/instar/a.efi").version == X
    assert oracles.holds(machine.disk, "a", machine.world.image(X).root)


def test_a_lost_variable_store_leaves_the_fallback(machine: Machine) -> None:
    machine.start()
    machine.cut_power()
    stores.lost(machine.vm.variables)
    machine.start()
    assert machine.versions() == [f"{X} firmware"] * 2
    machine.power_off()
    assert oracles.Esp(machine.disk).kernel(oracles.FALLBACK).version == X


def test_kexec_goes_on_with_the_watchdog(machine: Machine, world: World) -> None:
    """One hop into a sound kernel; then one into a kernel that stands still before it has any driver."""
    machine.put("EFI/lab/hangs.efi", world.broken("hangs-early").kernel)
    machine.start()
    jump(machine, "EFI/instar/a.efi")
    machine.up(X, "kexec")
    machine.connected()

    jump(machine, "EFI/lab/hangs.efi")
    machine.wait("LAB hangs early")
    machine.up(X, "firmware")
    assert machine.versions() == [f"{X} firmware", f"{X} kexec", f"{X} firmware"]


def test_systemd_boot_starts_the_preferred_image(machines: Callable[..., Machine], world: World) -> None:
    machine = machines(world.image(X), counting=True)
    machine.start()
    machine.power_off()
    esp = oracles.Esp(machine.disk)
    assert esp.kernel("EFI/Linux/instar-a.efi").version == X
    assert "LoaderSystemToken" not in oracles.Firmware.of(machine.vm.variables).names


def test_secure_boot_starts_what_is_signed(machines: Callable[..., Machine], world: World) -> None:
    machine = machines(world.image(X, signed=True), secure=True)
    machine.start()
    assert "Secure boot enabled" in machine.do("dmesg | grep -i 'secure boot'")
    jump(machine, "EFI/instar/a.efi")
    machine.up(X, "kexec")
    machine.power_off()

    unsigned = world.image(X).kernel
    esp = oracles.Esp(machine.disk)
    assert esp.kernel(oracles.FALLBACK).signed
    for path in (oracles.FALLBACK, "EFI/instar/a.efi"):
        machine.put(path, unsigned)
    assert not esp.kernel(oracles.FALLBACK).signed
    machine.power_on()
    machine.wait("Access Denied", REFUSED_S)
    assert machine.versions(machine.since) == []
