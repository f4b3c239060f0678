"""The guard of a system on trial: what it waits for, when it restarts the machine, and how often at most."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from instar.core.errors import MachineError
from instar.core.settings import Settings, TrialSettings
from instar.engine.journal import Journals
from instar.host.clock import Clock
from instar.host.layout import Layout
from instar.oneshot.boot_guard import DOWN_WITHIN_S, MOST, Machine, bound_s, guard
from instar.targets.slots.records import SlotRecord, write_records

DIGEST = "ab" * 48
SETTINGS = Settings(trial=TrialSettings(lease_s=60.0, cap_s=100.0))
BOUND_S = bound_s(SETTINGS)


class Time(Clock):
    def __init__(self) -> None:
        self.now = 10.0

    def boottime(self) -> float:
        return self.now


class World:
    """Slot a is sound, b on trial; `running` is what is mounted. What happens at a time is in `later`."""

    def __init__(self, folder: Path, running: str = "b") -> None:
        self.layout, self.clock, self.running = Layout(folder), Time(), running
        self.done: list[tuple[str, float]] = []
        self.goes_down, self.since = True, 5.0
        self.later: list[tuple[float, str]] = []
        self.records("trial")

    def records(self, state: str) -> None:
        tried = SlotRecord("1.1.0", DIGEST, state, since=self.since)
        slots = {"a": SlotRecord("1.0.0", state="good"), "b": tried}
        write_records(self.layout.state / "os" / "slots.json", slots)

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= 5.0
        self.clock.now += seconds
        for at, state in self.later:
            if at <= self.clock.now:
                self.records(state)

    def restart(self) -> None:
        self.done.append(("restart", self.clock.now))
        if not self.goes_down:
            raise MachineError("no-reboot", "cannot restart the machine: nobody does it")

    def guard(self) -> str:
        machine = Machine(
            lambda: self.running,
            self.restart,
            lambda: self.done.append(("force", self.clock.now)),
            self.sleep,
        )
        return guard(self.layout, SETTINGS, self.clock, machine)


def test_ends_at_once_where_nothing_is_on_trial(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.records("good")
    assert "no trial" in world.guard()
    assert (world.done, world.clock.now) == ([], 10.0)


def test_leaves_the_old_system_alone_that_came_back(tmp_path: Path) -> None:
    assert "no trial" in World(tmp_path, running="a").guard()


def test_ends_when_the_trial_is_decided(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.later = [(BOUND_S - 1.0, "good")]
    assert "no trial" in world.guard()
    assert world.done == []


@pytest.mark.parametrize("running", ["b", ""])
def test_restarts_what_nobody_decides_and_forces_it_down(tmp_path: Path, running: str) -> None:
    world = World(tmp_path, running)
    assert "did not go down" in world.guard()
    assert world.done == [("restart", BOUND_S), ("force", BOUND_S + DOWN_WITHIN_S)]
    assert SETTINGS.trial.cap_s < BOUND_S  # the updater goes first


def test_forces_it_at_once_where_nobody_takes_it_down(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.goes_down = False
    world.guard()
    assert world.done == [("restart", BOUND_S), ("force", BOUND_S)]


def test_does_not_restart_for_ever(tmp_path: Path) -> None:
    world = World(tmp_path, running="")
    for _ in range(MOST):
        world.clock.now = 10.0
        world.guard()
    world.done.clear()
    world.clock.now = 10.0
    assert "left alone" in world.guard()
    assert world.done == []
    (tmp_path / "os" / "guard.json").write_text("no JSON")
    assert "did not go down" in world.guard()


def test_two_trials_of_a_version_are_counted_apart(tmp_path: Path) -> None:
    world = World(tmp_path)
    for since in (1_763_781_598.0, 1_763_781_598.0 - 4000.0):
        world.since = since
        world.records("trial")
        for _ in range(MOST):
            world.clock.now = 10.0
            assert "did not go down" in world.guard()
    world.clock.now = 10.0
    assert f"left alone: b 1.1.0 {DIGEST[:12]} 1763777598 is undecided" in world.guard()


def test_restarts_also_where_that_cannot_be_counted(tmp_path: Path) -> None:
    """A full disk, say."""
    world = World(tmp_path)
    (tmp_path / "os" / "guard.json").mkdir()
    assert "did not go down" in world.guard()
    assert world.done == [("restart", BOUND_S), ("force", BOUND_S + DOWN_WITHIN_S)]


def test_records_that_cannot_be_read_now_are_looked_at_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    path = tmp_path / "os" / "slots.json"
    path.unlink()
    path.mkdir()
    with pytest.raises(MachineError):
        world.guard()
    assert (world.clock.now, world.done) == (BOUND_S, [])
    world.clock.now = 10.0
    plain = world.sleep

    def sleep(seconds: float) -> None:
        plain(seconds)
        if path.is_dir():
            path.rmdir()
            world.records("trial")

    world.sleep = sleep  # type: ignore[method-assign]
    assert "did not go down" in world.guard()


def test_the_entry_ends_where_there_are_no_slots(tmp_path: Path) -> None:
    node = Path(__file__).parents[2] / "node/src"
    words = [sys.executable, "-m", "instar", "boot-guard", "--state", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(node)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_entry_needs_no_variables_and_no_firmware(tmp_path: Path) -> None:
    """A disk that is not there: nobody can tell what runs, and no trial is open either."""
    (tmp_path / "config.toml").write_text('[os]\ndisk = "/dev/not-there"\n')
    write_records(tmp_path / "os" / "slots.json", {"a": SlotRecord("1.0.0", state="good"), "b": SlotRecord()})
    node = Path(__file__).parents[2] / "node/src"
    words = [sys.executable, "-m", "instar", "boot-guard", "--state", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(node)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "no trial is open" in done.stderr
    assert json.loads((tmp_path / "os/slots.json").read_bytes())["slots"]["a"]["state"] == "good"


def test_journals_that_cannot_be_read_keep_nobody_in_a_dead_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Journals, "read_all", broken)
    world = World(tmp_path)
    world.guard()
    assert world.done[0] == ("restart", BOUND_S)
