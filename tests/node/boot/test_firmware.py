"""Slots as firmware entries: what is started next, after everything that can go wrong with variables."""

from __future__ import annotations

import platform
import resource
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from instar.core.errors import MachineError
from instar.host.boot.firmware import FALLBACK, Firmware, fallback
from instar.host.boot.loadoption import HardDrive, LoadOption, encode, order, order_bytes
from tests.node.boot.played import DRIVE, Machine, crashed_at_every_line

FOREIGN = encode(LoadOption("Another system", HardDrive(2, 1, 1, bytes(16)), "\\EFI\\other.efi"))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Slot A is preferred and runs; slot B has an image; another system has an entry."""
    return prepared(tmp_path / "m")


def prepared(folder: Path) -> Machine:
    made = Machine(folder)
    made.variables.write("Boot0000", FOREIGN)
    made.variables.write("BootOrder", order_bytes([0]))
    for slot in "ab":
        made.put_image(slot)
    made.firmware.prefer("a")
    return made


def test_preferred_slot_is_started_each_time(machine: Machine) -> None:
    assert [machine.boot(), machine.boot()] == ["a", "a"]
    assert machine.firmware.state().order == ("a", "b")
    assert (
        order(machine.variables.read("BootOrder") or b"")[-1] == 0
    )  # the other system is still there, behind


def test_slot_is_tried_once(machine: Machine) -> None:
    machine.firmware.try_once("b")
    assert machine.firmware.state().once == "b"
    assert [machine.boot(), machine.boot()] == ["b", "a"]


def test_slot_that_passed_is_preferred_by_a_cold_boot(machine: Machine) -> None:
    machine.firmware.try_once("b")
    assert machine.boot() == "b"
    machine.firmware.prefer("b")
    assert [machine.boot(), machine.boot()] == ["b", "b"]
    assert machine.firmware.state().order == ("b", "a")


def test_entry_that_is_tried_stands_in_the_order_too(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "m")
    machine.put_image("a")
    machine.firmware.prefer("a")
    machine.put_image("b")
    machine.firmware.try_once("b")  # some firmware overwrites an entry that only BootNext names
    numbers = order(machine.variables.read("BootOrder") or b"")
    assert len(numbers) == 2
    assert machine.boot() == "b"


def test_nothing_is_written_twice(machine: Machine) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in machine.variables.folder.iterdir()}
    machine.firmware.prefer("a")
    assert machine.firmware.repair() == []
    assert {path.name: path.stat().st_mtime_ns for path in machine.variables.folder.iterdir()} == before


def test_lost_variable_store_starts_a_slot_that_exists(machine: Machine) -> None:
    machine.firmware.try_once("b")
    machine.boot()
    machine.firmware.prefer("b")
    for path in machine.variables.folder.iterdir():
        path.unlink()
    assert machine.boot() == "b"  # by the fallback image
    assert machine.firmware.state().drift
    assert machine.firmware.repair()
    assert machine.firmware.state().order == ("b", "a")
    assert machine.firmware.state().drift == ()


def test_entry_that_firmware_dropped_is_made_again(machine: Machine) -> None:
    number = machine.firmware._numbers()["b"]
    machine.variables.delete(f"Boot{number:04X}")
    assert machine.firmware.state().drift == ("slot b has an image and no entry",)
    assert machine.firmware.repair() == ["made the entry of slot b again"]
    machine.firmware.try_once("b")
    assert machine.boot() == "b"


@pytest.mark.parametrize("slot", ["a", "b"])
def test_entries_made_again_come_before_what_firmware_made_of_its_own(machine: Machine, slot: str) -> None:
    machine.firmware.prepare("b")
    machine.firmware.prefer(slot)
    for path in machine.variables.folder.iterdir():
        path.unlink()
    machine.variables.write("Boot0000", encode(LoadOption("UiApp", DRIVE, "\\EFI\\ui.efi")))
    machine.variables.write("BootOrder", order_bytes([0]))
    machine.firmware.repair()
    now = order(machine.variables.read("BootOrder") or b"")
    numbers = machine.firmware._numbers()
    assert now == [numbers[slot], numbers["ab".replace(slot, "")], 0]


def test_order_that_somebody_changed_is_seen_and_put_back(machine: Machine) -> None:
    now = order(machine.variables.read("BootOrder") or b"")
    machine.variables.write("BootOrder", order_bytes([now[1], now[2], now[0]]))
    assert "slot b goes first" in machine.firmware.state().drift[0]
    assert machine.firmware.repair() == ["put slot a first again"]
    assert machine.boot() == "a"


def test_stale_and_second_entries_of_ours_are_pruned_and_others_left(machine: Machine) -> None:
    moved = DRIVE._replace(first=9)  # the partition lay elsewhere once
    machine.variables.write("Boot0007", encode(LoadOption("Instar slot A", moved, "\\EFI\\instar\\a.efi")))
    twice = machine.variables.read(f"Boot{machine.firmware._numbers()['a']:04X}") or b""
    machine.variables.write("Boot0008", twice)
    machine.variables.write("BootOrder", (machine.variables.read("BootOrder") or b"") + order_bytes([7, 8]))
    assert len(machine.firmware.repair()) == 2
    assert machine.variables.read("Boot0000") == FOREIGN
    numbers = order(machine.variables.read("BootOrder") or b"")
    assert 7 not in numbers
    assert machine.boot() == "a"


def test_slot_without_an_image_is_never_preferred(machine: Machine) -> None:
    machine.firmware.kernel("b").unlink()
    with pytest.raises(MachineError, match="no image") as error:
        machine.firmware.prefer("b")
    assert error.value.code == "no-kernel-image"
    assert machine.boot() == "a"


def test_fallback_image_is_always_the_preferred_slots(machine: Machine) -> None:
    assert (machine.esp / FALLBACK).read_bytes() == machine.firmware.kernel("a").read_bytes()
    machine.firmware.prefer("b")
    assert (machine.esp / FALLBACK).read_bytes() == machine.firmware.kernel("b").read_bytes()


def test_fallback_image_has_the_name_that_the_machines_firmware_looks_for() -> None:
    assert fallback("x86_64") == "EFI/BOOT/BOOTX64.EFI"
    assert fallback("aarch64") == "EFI/BOOT/BOOTAA64.EFI"
    assert fallback(platform.machine()) == FALLBACK


def test_partition_that_cannot_be_read_is_told(machine: Machine) -> None:
    unreadable = machine.esp / ("x" * 300)  # a name that no file system takes
    firmware = Firmware(machine.variables, unreadable, DRIVE, machine.memory)
    for act in (firmware.state, firmware.repair, lambda: firmware.prepare("a")):
        with pytest.raises(MachineError) as error:
            act()
        assert error.value.code == "disk-failed"


def test_full_store_changes_nothing(machine: Machine, tmp_path: Path) -> None:
    """A write that fails leaves no empty variable, and the order as it was."""
    full = Machine(tmp_path / "full")
    full.put_image("a")
    full.firmware.prefer("a")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    full.put_image("b")
    import signal

    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(MachineError, match="cannot write EFI variable"):
            full.firmware.try_once("b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert all(path.stat().st_size > 4 for path in full.variables.folder.iterdir())
    assert full.boot() == "a"


@pytest.mark.parametrize(
    ("act", "may_run"),
    [
        (lambda machine: machine.firmware.try_once("b"), {"a", "b"}),
        (lambda machine: machine.firmware.prefer("b"), {"a", "b"}),
        (lambda machine: machine.firmware.repair(), {"a"}),
    ],
    ids=["try once", "prefer", "repair"],
)
def test_some_slot_always_starts_wherever_it_is_cut_off(
    memory: Path, act: Callable[[Machine], object], may_run: set[str]
) -> None:
    numbers = count()
    machines = crashed_at_every_line(lambda: prepared(memory / str(next(numbers))), act)
    assert len(machines) > 20
    for machine in machines:
        assert machine.boot() in may_run
        assert machine.boot() in may_run  # and the boot after it
        act(machine)  # done again after the crash, it comes to its end
        machine.firmware.repair()
        assert machine.boot() in may_run
    for machine in machines:
        for path in machine.variables.folder.iterdir():
            path.unlink()
        assert machine.boot() in may_run  # the store lost on top of it
