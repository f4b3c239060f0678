"""Secure Boot: the firmware starts what is signed by its keys and nothing else, and so does kexec. On one machine."""

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
    one_that_a_stranger_has_signed(machine, world)
    machine.power_off()
    starts_from_a(machine, x)
    assert oracles.Esp(machine.disk).kernel(oracles.FALLBACK).signed

    machine.start()
    signed_ones(machine, world.image(Y, signed=True), world.image(Z, signed=True))
    assert machine.versions() == [*[f"{X} firmware"] * 4, f"{Y} firmware", f"{Z} kexec", f"{Z} firmware"]


def an_unsigned_one_by_kexec(machine: Machine, world: World) -> None:
    """The kernel refuses it, so it is to be a reboot; the firmware refuses it, too, and starts the old one."""
    order = machine.update_os(world.publish(world.image(Y)), "kexec")
    machine.wait(REFUSED)
    comes_back(machine, order, "fell-back")
    is_kept_out(machine, order)
    assert "kexec-refused" in json.dumps(machine.history())


def one_that_a_stranger_has_signed(machine: Machine, world: World) -> None:
    strangers = signing.keys(world.cache / "strangers")
    image = variant.kept(Z, world.cache, keys=strangers)
    order = machine.update_os(relabelled.publish(world, image, name="strange"), "reboot")
    machine.wait(REFUSED)
    comes_back(machine, order, "fell-back")
    is_kept_out(machine, order)


def signed_ones(machine: Machine, y: Image, z: Image) -> None:
    """By reboot, then by kexec, and then the firmware starts that one, too."""
    world = machine.world
    order = machine.update_os(relabelled.publish(world, y, name="signed"), "reboot")
    machine.up(Y)
    assert machine.ended(order)["outcome"] == "confirmed"
    order = machine.update_os(relabelled.publish(world, z, name="signed"), "kexec")
    machine.up(Z, "kexec")
    assert machine.ended(order)["outcome"] == "confirmed, cold boot not seen"
    machine.power_off()
    machine.start(Z)
    machine.reported(lambda seen: seen["slots"]["a"]["cold_boot_seen"], "a cold boot that was seen")
    machine.power_off()
    firmware, esp = oracles.Firmware.of(machine.vm.variables), oracles.Esp(machine.disk)
    assert (firmware.slots, firmware.once) == ("ab", ""), firmware
    for path, version in ((oracles.FALLBACK, Z), ("EFI/instar/a.efi", Z), ("EFI/instar/b.efi", Y)):
        kernel = esp.kernel(path)
        assert (kernel.version, kernel.signed) == (version, True), path
    assert oracles.holds(machine.disk, "a", z.root)
    assert oracles.holds(machine.disk, "b", y.root)
