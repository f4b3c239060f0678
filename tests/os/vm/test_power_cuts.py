"""The updater is killed and the power goes, while a slot is written and around the asking of the firmware; a bit is
flipped in a slot."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from instar.core.errors import MachineError
from instar_lab.osimage.variant import Image
from tests.os.vm import oracles
from tests.os.vm.falls import comes_back, flip, is_kept_out, starts_from_a
from tests.os.vm.world import Machine, World, X, Y, settings

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("vm-power-cuts")]
MORE = 6 << 20  # bytes of the image that the running slot has not
RATE = "\n[network]\nrate_bytes_s = 600000\n"
SUPERBLOCK = 1024
SLOT_B = "\\EFI\\instar\\b.efi"
# Kills the updater as soon as a journal holds some words; says whether the firmware was asked by then.
KILLER = """
import glob, os, signal, sys, time

words, end = sys.argv[1].encode(), time.monotonic() + 200
while not any(words in open(name, "rb").read() for name in glob.glob("/data/instar/journal/*.journal")):
    if time.monotonic() > end:
        sys.exit("no such words in time")
    time.sleep(0.02)
for name in filter(str.isdecimal, os.listdir("/proc")):
    line = open(f"/proc/{name}/cmdline", "rb").read().split(b"\\0")
    if b"updater" in line and b"--rehearse" not in line:
        os.kill(int(name), signal.SIGKILL)
        print("killed")
print("asked" if glob.glob("/sys/firmware/efi/efivars/BootNext-*") else "not asked")
"""


def longer(image: Image, folder: Path) -> Image:
    """The same system with something behind its hash tree, which has to be fetched."""
    root = folder / "longer.root"
    root.write_bytes(image.root.read_bytes() + random.Random(5).randbytes(MORE))
    return image._replace(root=root)


@pytest.fixture
def y(world: World, tmp_path: Path) -> Image:
    return longer(world.image(Y), tmp_path)


def kill_updater(machine: Machine, words: str) -> None:
    """As soon as a journal holds `words`; which is before the firmware was asked."""
    *killed, asked = machine.do(f"python3 -I -S -c '{KILLER}' '{words}'", 240.0).splitlines()
    assert (set(killed), asked) == ({"killed"}, "not asked")


def is_written(machine: Machine, at_least: int) -> None:
    machine.reported(
        lambda seen: (seen["update"] or {}).get("done", 0) > at_least, f"{at_least} bytes of a slot", 240.0
    )


def test_killed_and_cut_while_it_writes_and_around_boot_next(
    machines: Callable[..., Machine], world: World, y: Image
) -> None:
    machine = machines(world.image(X), config=settings(more=RATE))
    machine.start()
    order = machine.update_os(world.publish(y, name="longer"), "reboot")
    size = y.root.stat().st_size
    is_written(machine, size - MORE * 3 // 4)
    kill_updater(machine, '"step":"stage"')
    is_written(machine, size - MORE // 2)
    machine.cut_power()
    assert "EFI/instar/b.efi" not in oracles.Esp(machine.disk).files()
    assert oracles.Firmware.of(machine.vm.variables).once == ""
    assert not oracles.holds(machine.disk, "b", y.root)

    machine.power_on()  # it goes on by itself
    machine.up(X)
    kill_updater(machine, '"step":"activate"')
    machine.wait("LAB going down", 300.0)
    machine.cut_power()
    assert oracles.Firmware.of(machine.vm.variables).once == SLOT_B
    assert oracles.holds(machine.disk, "b", y.root)
    assert oracles.Esp(machine.disk).kernel("EFI/instar/b.efi").version == Y

    machine.power_on()
    machine.up(Y)
    assert machine.ended(order)["outcome"] == "confirmed"
    machine.power_off()
    assert oracles.Firmware.of(machine.vm.variables).slots == "ba"
    assert oracles.holds(machine.disk, "b", y.root)
    assert machine.versions() == [f"{version} firmware" for version in (X, X, Y)]


@pytest.mark.slow
def test_a_bit_of_the_new_slot_is_flipped(machine: Machine, world: World) -> None:
    """After the last look at it, so that only its own hash tree sees it; and while it lies there for a rollback."""
    y = world.image(Y)
    bundle = world.publish(y)
    machine.start()
    order = machine.update_os(bundle, "reboot")
    machine.wait("LAB going down", 300.0)
    machine.cut_power()
    flip(machine, "b", SUPERBLOCK)
    machine.power_on()
    machine.wait("LAB no slot has this root")
    comes_back(machine, order, "fell-back")
    is_kept_out(machine, order)

    order = machine.update_os(bundle, "none")
    assert machine.ended(order)["outcome"] == "installed, not active"
    machine.power_off()
    starts_from_a(machine, world.image(X), kernel_b=Y)
    assert oracles.holds(machine.disk, "b", y.root)
    flip(machine, "b", SUPERBLOCK)
    machine.start()
    with pytest.raises(MachineError, match="cannot trust slot b"):
        machine.instar("rollback", "--line", "os")
    machine.reported(
        lambda seen: seen["slots"]["b"]["state"] == "bad" and not seen["update"], "a slot known as bad"
    )

    order = machine.update_os(bundle, "reboot")
    machine.up(Y)
    assert machine.ended(order)["outcome"] == "confirmed"
    assert machine.versions() == [f"{version} firmware" for version in (X, X, X, Y)]
