"""recovery.launch and recovery.guard: which release runs, counted before it does."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from instar.core.errors import MachineError
from instar.core.journal import Reason
from instar.core.trial import Lease
from instar.host import points, processes, trials
from instar.host.line import Line
from instar.host.locks import RoleLock
from instar.host.trials import Trial
from instar.recovery import guard, launch
from tests.node.world import Node, build, put


class Kill(BaseException):
    pass


def on_trial(node: Node, **changes: object) -> Trial:
    put(node.line, node.new)
    lease = Lease(2.0, 20.0, node.clock.boot_id(), node.clock.boottime())
    record = replace(Trial("tx-1", node.new.name, node.old.name, 3, lease), **changes)  # type: ignore[arg-type]
    trials.write(node.line, record)
    node.line.activate(node.new.name, fallback=node.old.name)
    return record


def chosen(node: Node) -> str:
    return launch.choose(Line(node.layout.line("agent")), node.clock)


def undone(node: Node) -> str:
    record = trials.read(node.line)
    assert record is not None
    return record.undone.code if record.undone else ""


def damage(node: Node, name: str) -> None:
    path = node.line.program(name)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_without_a_trial_current_runs_and_nothing_is_written(node: Node) -> None:
    assert chosen(node) == node.old.name
    assert not node.line.layout.trial.exists()


def test_a_trial_has_so_many_starts_and_then_the_previous_release_runs(node: Node) -> None:
    on_trial(node)
    assert [chosen(node) for _ in range(5)] == [node.new.name] * 3 + [node.old.name] * 2
    assert undone(node) == "attempts-used-up"
    assert node.line.current() == node.old.name


def test_a_start_is_counted_on_the_disk_before_it_is_made(node: Node) -> None:
    """Killed right after the count: the start counts, though it never came to it."""
    on_trial(node)

    def kill(point: str) -> None:
        if point == "launch:counted":
            raise Kill

    points.listener = kill
    try:
        for number in range(1, 4):
            with pytest.raises(Kill):
                chosen(node)
            record = trials.read(node.line)
            assert record is not None
            assert record.attempts == number
    finally:
        points.listener = None
    assert chosen(node) == node.old.name


def test_a_confirmed_trial_is_not_counted(node: Node) -> None:
    on_trial(node, confirmed=True, attempts=3)
    assert chosen(node) == node.new.name


def test_a_trial_of_another_release_does_not_concern_current(node: Node) -> None:
    on_trial(node, release="9.9.9-0123456789ab", attempts=3)
    assert chosen(node) == node.new.name


def test_a_lapsed_trial_is_over(node: Node) -> None:
    on_trial(node)
    node.clock.now += 26
    assert chosen(node) == node.old.name
    assert undone(node) == "lease-lapsed"


def test_a_damaged_release_on_trial_is_not_started(node: Node) -> None:
    on_trial(node)
    damage(node, node.new.name)
    assert chosen(node) == node.old.name
    assert undone(node) == "release-damaged"


def test_an_undo_that_was_cut_off_is_finished(node: Node) -> None:
    on_trial(node, undone=Reason("lease-lapsed", "over"))
    assert chosen(node) == node.old.name
    assert node.line.current() == node.old.name


def test_without_a_way_back_the_one_on_trial_goes_on(node: Node) -> None:
    on_trial(node, attempts=3)
    damage(node, node.old.name)
    assert chosen(node) == node.new.name
    assert undone(node) == "attempts-used-up"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda n: damage(n, n.new.name),
        lambda n: n.line.layout.current.unlink(),
        lambda n: (
            n.line.layout.current.unlink(),
            n.line.layout.current.symlink_to("releases/9.9.9-0123456789ab"),
        ),
        lambda n: (n.line.layout.current.unlink(), n.line.layout.current.write_text("not a link")),
    ],
    ids=["damaged", "gone", "to a missing one", "a file"],
)
def test_a_current_that_cannot_run_is_repaired_from_previous(
    node: Node, spoil: Callable[[Node], object]
) -> None:
    put(node.line, node.new)
    node.line.activate(node.new.name, fallback=node.old.name)
    spoil(node)
    assert chosen(node) == node.old.name
    assert node.line.current() == node.old.name


def test_without_previous_the_highest_valid_version_runs(node: Node) -> None:
    for version in ("1.9.0", "1.10.0"):
        put(node.line, build(version))
    damage(node, node.old.name)
    assert chosen(node) == build("1.10.0").name


def test_nothing_valid_is_said_so(node: Node) -> None:
    damage(node, node.old.name)
    with pytest.raises(MachineError, match="no valid release") as caught:
        chosen(node)
    assert caught.value.code == "no-release"
    assert node.line.current() == node.old.name


@pytest.mark.parametrize(
    "argv", [[], ["agent"], ["moon", "--state", "/x"], ["agent", "-s", "/x"], ["agent", "--state", "/x", "y"]]
)
def test_bad_words_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for main in (launch.main, guard.main):
        assert main(argv) == 2
    assert "usage" in capsys.readouterr().err


def test_a_second_launcher_leaves_the_first_ones_role_alone(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    on_trial(node)
    with RoleLock(node.layout.role_lock("agent")) as lock:
        lock.acquire(1.0)
        assert launch.main(["agent", "--state", str(node.layout.state)]) == 4
    assert "another process is this node's agent" in capsys.readouterr().err
    record = trials.read(node.line)
    assert record is not None
    assert record.attempts == 0


# --- the guard


class Started:
    """A service manager that is only asked to start things."""

    name = "fake"

    def start(self, role: str) -> None:
        assert role == "agent"

    def restart(self, role: str) -> None:
        raise AssertionError("the guard has ended the process itself")

    stop = restart


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])


def test_the_guard_leaves_an_open_trial_alone(node: Node) -> None:
    on_trial(node)
    node.clock.now += 19
    assert guard.guard(node.layout, "agent", node.clock, Started()) == ""
    assert node.line.current() == node.new.name


@pytest.mark.parametrize("confirmed", [False, True])
def test_the_guard_ends_a_lapsed_trial_and_its_process(node: Node, confirmed: bool) -> None:
    on_trial(node, confirmed=confirmed)
    node.clock.now += 26
    child = sleeper()
    try:
        record = processes.Process(
            child.pid, processes.start_time(child.pid) or 0, node.clock.boot, node.new.name
        )
        processes.record(node.layout.process("agent"), record)
        why = guard.guard(node.layout, "agent", node.clock, Started())
        assert bool(why) is not confirmed
        assert node.line.current() == (node.new if confirmed else node.old).name
        assert (child.poll() is None) is confirmed
        assert guard.guard(node.layout, "agent", node.clock, Started()) == ""
    finally:
        child.kill()
        child.wait()


def test_a_hung_process_that_holds_its_lines_lock_is_ended_by_the_guard(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_trial(node)
    node.clock.now += 26
    hold = "import fcntl, sys, time as t; file = open(sys.argv[1], 'a'); fcntl.flock(file, 2); print('held', flush=True); t.sleep(60)"
    words = [sys.executable, "-c", hold, str(node.line.layout.lock)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"held\n"
            record = processes.Process(
                child.pid, processes.start_time(child.pid) or 0, node.clock.boot, node.new.name
            )
            processes.record(node.layout.process("agent"), record)
            monkeypatch.setattr(guard, "LOCK_WAIT_S", 0.2)
            assert guard.guard(node.layout, "agent", node.clock, Started())
            assert node.line.current() == node.old.name
        finally:
            child.kill()


def test_the_guard_does_not_touch_a_process_of_another_release(node: Node) -> None:
    on_trial(node)
    node.clock.now += 26
    child = sleeper()
    try:
        record = processes.Process(
            child.pid, processes.start_time(child.pid) or 0, node.clock.boot, node.old.name
        )
        processes.record(node.layout.process("agent"), record)
        assert guard.guard(node.layout, "agent", node.clock, Started())
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("point", ["undo:written", "undo:flipped"])
def test_a_killed_guard_is_finished_by_the_next_one(node: Node, point: str) -> None:
    on_trial(node)
    node.clock.now += 26
    child = sleeper()

    def kill(at: str) -> None:
        if at == point:
            raise Kill

    try:
        record = processes.Process(
            child.pid, processes.start_time(child.pid) or 0, node.clock.boot, node.new.name
        )
        processes.record(node.layout.process("agent"), record)
        points.listener = kill
        with pytest.raises(Kill):
            guard.guard(node.layout, "agent", node.clock, Started())
        points.listener = None
        assert guard.guard(node.layout, "agent", node.clock, Started())
        assert node.line.current() == node.old.name
        assert child.wait(30) < 0  # the hanging process of the bad release is gone too
    finally:
        points.listener = None
        child.kill()
        child.wait()


# --- starts without a welcome


def test_starts_are_counted_for_one_release_and_boot(node: Node) -> None:
    line, clock = node.line, node.clock
    for number in range(1, launch.MOST_STARTS + 3):
        node.clock.now += 1
        launch._count(node.layout, node.old.name, clock)
        assert len(launch._starts(node.layout, node.old.name, clock)) == min(number, launch.MOST_STARTS)
    assert launch._starts(node.layout, node.new.name, clock) == []
    node.clock.now += launch.STARTS_S + 10
    assert launch._starts(node.layout, line.current(), clock) == []
    launch._count(node.layout, node.old.name, clock)
    node.clock.reboot()
    assert launch._starts(node.layout, node.old.name, clock) == []


@pytest.mark.parametrize("text", ["", "x", "x\ny", "\xff", "1.0.0 b\n1 2 three"])
def test_a_count_that_cannot_be_read_is_none(node: Node, text: str) -> None:
    node.layout.starts.write_bytes(text.encode("latin-1"))
    assert launch._starts(node.layout, node.old.name, node.clock) == []
    launch._count(node.layout, node.old.name, node.clock)
    assert len(launch._starts(node.layout, node.old.name, node.clock)) == 1


def test_a_count_that_cannot_be_written_stops_nothing(node: Node) -> None:
    node.layout.starts.mkdir()
    launch._count(node.layout, node.old.name, node.clock)


def test_a_line_that_was_deleted_is_no_fault_of_the_launcher(node: Node) -> None:
    shutil.rmtree(node.line.layout.folder)
    with pytest.raises(MachineError) as caught:
        chosen(node)
    assert caught.value.code == "no-release"


def test_the_updater_is_served_by_the_agents_release_where_its_own_line_has_none(node: Node) -> None:
    updater = Line(node.layout.line("updater"))
    found, release = launch._for_updater(node.layout, node.clock)
    assert found.program(release) == updater.program(node.old.name)
    path = updater.program(node.old.name)
    path.chmod(0o600)
    path.write_bytes(bytes(10))
    found, release = launch._for_updater(node.layout, node.clock)
    assert (found.program(release), release) == (node.line.program(node.old.name), node.old.name)
    damage(node, node.old.name)
    with pytest.raises(MachineError, match="no valid release"):
        launch._for_updater(node.layout, node.clock)
