"""Secure Boot: the firmware starts what is signed by its keys and nothing else, and so does kexec."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from instar_lab.osimage import signing, variant
from instar_lab.osimage.variant import Image
from tests.os.vm import oracles, relabelled
from tests.os.vm.falls import comes_back, is_kept_out, starts_from_a
from tests.os.vm.world import Machine, World, X, Y, Z

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("vm-secure")]

REFUSED = "Access Denied"


def test_only_what_is_signed_is_started(machines: Callable[..., Machine], world: World) -> None:
    x = world.image(X, signed=True)
    machine = machines(x, secure=True)
    machine.start()
    assert "Secure boot enabled" in machine.do("dmesg")
    an_unsigned_one_by_kexec(machine, world)
    starts_from_a(machine, x)
    assert oracles.Esp(machine.disk).kernel(oracles.FALLBACK).signed
    signed_ones(machine, world.image(Y, signed=True), world.image(Z, signed=True))
    assert machine.versions() == [*[f"{X} firmware"] * 2, f"{Y} firmware", f"{Z} kexec"]


@pytest.mark.slow
def test_one_that_a_stranger_has_signed_is_not(machines: Callable[..., Machine], world: World) -> None:
    x = world.image(X, signed=True)
    machine = machines(x, secure=True)
    machine.start()
    image = variant.kept(Z, world.cache, keys=signing.keys(world.cache / "strangers"))
    order = machine.update_os(relabelled.publish(world, image, name="strange"), "reboot")
    machine.wait(REFUSED)
    comes_back(machine, order, "fell-back")
    is_kept_out(machine, order)
    starts_from_a(machine, x)


def an_unsigned_one_by_kexec(machine: Machine, world: World) -> None:
    """The kernel refuses it, so it is to be a reboot; the firmware refuses it, too, and starts the old one."""
    order = machine.update_os(world.publish(world.image(Y)), "kexec")
    machine.wait(REFUSED)
    comes_back(machine, order, "fell-back")
    is_kept_out(machine, order)
    assert "kexec-refused" in json.dumps(machine.history())


def signed_ones(machine: Machine, y: Image, z: Image) -> None:
    """By reboot, then by kexec; the firmware is asked to try that one, too."""
    world = machine.world
    order = machine.update_os(relabelled.publish(world, y, name="signed"), "reboot")
    machine.up(Y)
    assert machine.ended(order)["outcome"] == "confirmed"
    order = machine.update_os(relabelled.publish(world, z, name="signed"), "kexec")
    machine.up(Z, "kexec")
    assert machine.ended(order)["outcome"] == "confirmed, cold boot not seen"
    machine.power_off()
    firmware, esp = oracles.Firmware.of(machine.vm.variables), oracles.Esp(machine.disk)
    assert (firmware.slots, firmware.once) == ("ba", "\\EFI\\instar\\a.efi"), firmware
    for path, version in ((oracles.FALLBACK, Y), ("EFI/instar/a.efi", Z), ("EFI/instar/b.efi", Y)):
        kernel = esp.kernel(path)
        assert (kernel.version, kernel.signed) == (version, True), path
    assert oracles.holds(machine.disk, "a", z.root)
    assert oracles.holds(machine.disk, "b", y.root)
