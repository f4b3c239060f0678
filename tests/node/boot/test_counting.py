"""Slots under systemd-boot: tries are counted, and a slot that never passes is left."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from instar.core.errors import MachineError
from instar.host.boot.counting import LOADER, Counting
from instar.host.boot.efivars import Variables
from tests.node.boot.played import Machine, crashed_at_every_line


def prepared(folder: Path) -> Machine:
    made = Machine(folder)
    boot = made.counting()
    for slot in "ab":
        made.put_image(slot, "EFI/Linux", f"instar-{slot}.efi")
    boot.prefer("a")
    return made


def test_slot_on_trial_is_tried_and_left_when_nobody_confirms_it(tmp_path: Path) -> None:
    machine = prepared(tmp_path / "m")
    boot = machine.counting()
    boot.prefer("a")
    boot.try_once("b")
    assert boot.state().once == "b"
    assert boot.state().tries == {"b": 2}
    assert machine.boot_by_loader() == "b"
    assert boot.state().tries == {"b": 1}
    assert [machine.boot_by_loader(), machine.boot_by_loader()] == ["a", "a"]


def test_slot_that_passed_stays(tmp_path: Path) -> None:
    machine = prepared(tmp_path / "m")
    boot = machine.counting()
    boot.prefer("a")
    boot.try_once("b")
    assert machine.boot_by_loader() == "b"
    boot.prefer("b")
    assert boot.state().tries == {}
    assert [machine.boot_by_loader(), machine.boot_by_loader()] == ["b", "b"]
    assert boot.state().order == ("b", "a")


def test_settings_of_others_stay(tmp_path: Path) -> None:
    machine = prepared(tmp_path / "m")
    settings = machine.esp / "loader/loader.conf"
    settings.write_text("timeout 3\ndefault other\neditor no\n")
    Counting(machine.loader_variables, machine.esp).prefer("b")
    assert settings.read_text() == "default instar-b*\ntimeout 3\neditor no\n"


def test_preferred_slot_that_is_gone_is_repaired(tmp_path: Path) -> None:
    machine = prepared(tmp_path / "m")
    boot = machine.counting()
    boot.prefer("a")
    boot.kernel("a").unlink()
    assert boot.state().drift == ("the preferred slot has no image",)
    assert boot.repair()
    assert machine.boot_by_loader() == "b"
    with pytest.raises(MachineError, match="no image"):
        boot.try_once("a")


def test_loader_is_used_only_where_it_is_there(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "m")
    assert not Counting.usable(machine.esp)
    machine.counting()
    assert Counting.usable(machine.esp)


def own_default(machine: Machine, name: str) -> None:
    """As a key in the loader's menu, or `bootctl set-default`, does it."""
    machine.loader_variables.write("LoaderEntryDefault", f"{name}\0".encode("utf-16-le"))


def test_loaders_own_default_is_seen_and_put_right(tmp_path: Path) -> None:
    machine = prepared(tmp_path / "m")
    boot = Counting(machine.loader_variables, machine.esp)
    own_default(machine, "instar-b.efi")
    assert machine.boot_by_loader() == "b"
    assert boot.state().order == ("b", "a")
    assert boot.state().drift == ("the loader's own default is instar-b.efi, and we left slot a first",)
    assert boot.repair() == ["put slot a first again: the loader's own default was instar-b.efi"]
    assert (machine.boot_by_loader(), boot.state().order, boot.state().drift) == ("a", ("a", "b"), ())
    assert machine.loader_variables.names() == []
    assert boot.repair() == []


@pytest.mark.parametrize("name", ["instar-a.efi", "instar-*", "@saved", "other.conf"])
def test_slot_that_is_preferred_is_started_whatever_the_loaders_own_default_was(
    tmp_path: Path, name: str
) -> None:
    machine = prepared(tmp_path / "m")
    boot = Counting(machine.loader_variables, machine.esp)
    own_default(machine, name)
    boot.prefer("b")
    assert machine.loader_variables.read("LoaderEntryDefault") is None
    assert (machine.boot_by_loader(), boot.state().order, boot.state().drift) == ("b", ("b", "a"), ())


@pytest.mark.parametrize("name", ["instar-a.efi", "instar-a*"])
def test_own_default_that_names_the_preferred_slot_stays(tmp_path: Path, name: str) -> None:
    machine = prepared(tmp_path / "m")
    boot = Counting(machine.loader_variables, machine.esp)
    own_default(machine, name)
    boot.prefer("a")
    assert boot.repair() == []
    assert boot.state().drift == ()
    assert machine.loader_variables.read("LoaderEntryDefault")


def test_own_default_of_a_slot_without_an_image_changes_no_order(tmp_path: Path) -> None:
    machine = prepared(tmp_path / "m")
    boot = Counting(machine.loader_variables, machine.esp)
    own_default(machine, "instar-b.efi")
    boot.kernel("b").unlink()
    assert (machine.boot_by_loader(), boot.state().order) == ("a", ("a",))
    assert boot.state().drift
    assert boot.repair()
    assert boot.state().drift == ()


def test_preferred_slot_that_is_gone_takes_its_own_default_with_it(tmp_path: Path) -> None:
    machine = prepared(tmp_path / "m")
    boot = Counting(machine.loader_variables, machine.esp)
    own_default(machine, "instar-a.efi")
    boot.kernel("a").unlink()
    assert boot.repair()
    assert (machine.boot_by_loader(), boot.state().drift) == ("b", ())
    assert machine.loader_variables.names() == []


def test_machine_without_variables_needs_none(tmp_path: Path) -> None:
    machine = prepared(tmp_path / "m")
    boot = Counting(Variables(tmp_path / "none", LOADER), machine.esp)
    boot.prefer("b")
    assert boot.repair() == []
    assert (boot.state().order, boot.state().drift) == (("b", "a"), ())


def test_partition_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    machine = prepared(tmp_path / "m")
    unreadable = Counting(
        machine.loader_variables, tmp_path / ("x" * 300)
    )  # a name that no file system takes
    with pytest.raises(MachineError) as error:
        unreadable.state()
    assert error.value.code == "disk-failed"
    image = machine.esp / "EFI/Linux/instar-a.efi"
    image.unlink()
    image.symlink_to(image)
    with pytest.raises(MachineError) as error:
        machine.counting().state()
    assert error.value.code == "disk-failed"


@pytest.mark.parametrize("act", [lambda b: b.try_once("b"), lambda b: b.prefer("b")], ids=["try", "prefer"])
def test_some_slot_always_starts_wherever_it_is_cut_off(
    memory: Path, act: Callable[[Counting], object]
) -> None:
    numbers = count()

    def counting(machine: Machine) -> Counting:
        return Counting(machine.loader_variables, machine.esp)

    machines = crashed_at_every_line(
        lambda: prepared(memory / str(next(numbers))), lambda machine: act(counting(machine))
    )
    assert len(machines) > 10
    for machine in machines:
        assert machine.boot_by_loader() in ("a", "b")
        act(counting(machine))
        counting(machine).repair()
        assert machine.boot_by_loader() in ("a", "b")
