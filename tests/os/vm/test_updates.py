"""Requirement O5, the short run: X installs Y by a reboot, Y installs Z by kexec, and then the firmware starts Z."""

from __future__ import annotations

import pytest

from tests.os.vm import oracles
from tests.os.vm.world import Machine, World, X, Y, Z

KERNELS = ("EFI/instar/a.efi", "EFI/instar/b.efi", oracles.FALLBACK)

pytestmark = pytest.mark.xdist_group("vm-updates")  # not `os`: it is the short run that `make test` has


def test_reboot_into_the_next_then_kexec_into_the_one_after(machine: Machine, world: World) -> None:
    x, y, z = (world.image(version) for version in (X, Y, Z))
    machine.start()

    order = machine.update_os(world.publish(y), "reboot")
    machine.up(Y)
    ended = machine.ended(order)
    assert ended["outcome"] == "confirmed", ended
    assert (ended["slot"], ended["total"]) == ("b", y.root.stat().st_size)
    assert ended["reused"] > 0.9 * ended["total"], ended  # the two differ in a few files
    system = machine.reported(lambda seen: seen["slots"]["b"]["state"] == "good", "slot b that is good")
    assert (system["running"], system["boot"]["order"]) == ("b", ["b", "a"])
    assert [system["slots"][slot]["version"] for slot in "ab"] == [X, Y]
    assert system["slots"]["b"]["cold_boot_seen"]

    order = machine.update_os(world.publish(z), "kexec")
    machine.up(Z, "kexec")
    ended = machine.ended(order)
    assert ended["outcome"] == "confirmed, cold boot not seen", ended
    machine.power_off()

    # The firmware has not started Z yet: it will once, and else comes back to Y.
    firmware, esp = oracles.Firmware.of(machine.vm.variables), oracles.Esp(machine.disk)
    assert (firmware.slots, firmware.once) == ("ba", "\\EFI\\instar\\a.efi")
    assert [esp.kernel(path).version for path in KERNELS] == [Z, Y, Y]
    assert oracles.holds(machine.disk, "a", z.root)
    assert oracles.holds(machine.disk, "b", y.root)
    assert not oracles.holds(machine.disk, "a", x.root)

    machine.start(Z)
    machine.reported(lambda seen: seen["slots"]["a"]["cold_boot_seen"], "a cold boot that was seen")
    assert machine.versions() == [f"{X} firmware", f"{Y} firmware", f"{Z} kexec", f"{Z} firmware"]
    machine.power_off()
    firmware = oracles.Firmware.of(machine.vm.variables)
    assert (firmware.slots, firmware.once) == ("ab", "")
    assert [esp.kernel(path).version for path in KERNELS] == [Z, Y, Z]
