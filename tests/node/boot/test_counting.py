"""Slots under systemd-boot: tries are counted, and a slot that never passes is left."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from instar.core.errors import MachineError
from instar.host.boot.counting import Counting
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
