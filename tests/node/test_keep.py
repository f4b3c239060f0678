"""recovery.keep: a real keeper over tiny releases that only take their role and sleep."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import instar
from instar.host import processes
from instar.host.clock import Clock
from instar.host.layout import LINES
from instar.host.line import Line
from instar.host.locks import RoleLock
from tests.node.world import Built, Node, build, put

SOURCE = Path(instar.__file__).parents[1]
STEADY = """
import fcntl, os, sys, time
role, state = sys.argv[1], sys.argv[3]
with open(f"{state}/run/{role}.starts", "a") as log:
    log.write(f"{time.monotonic()} {os.getpid()}\\n")
lock = os.open(f"{state}/run/{role}.lock", os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(lock, fcntl.LOCK_EX)
time.sleep(120)
"""
WITHIN_S = 60.0
CRASH = STEADY.replace("time.sleep(120)", "sys.exit(3)")
KEEP = "import sys; sys.path.insert(0, sys.argv[1]); from instar.recovery.keep import main; sys.exit(main(sys.argv[2:]))"


class Kept:
    """A node kept by a real keeper."""

    def __init__(self, node: Node, text: str) -> None:
        self.node, self.clock = node, Clock()
        self.keepers: list[subprocess.Popen[bytes]] = []
        self.pids: set[int] = set()
        built: Built = build("2.0.0", text)
        for role in LINES:
            line = Line(node.layout.line(role))
            put(line, built)
            line.activate(built.name, fallback="")

    def keep(self, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        state = str(self.node.layout.state)
        command = [sys.executable, "-I", "-S", "-c", KEEP, str(SOURCE), "--state", state]
        self.keepers.append(subprocess.Popen(command, stderr=stderr))
        return self.keepers[-1]

    def starts(self, role: str) -> list[tuple[float, int]]:
        try:
            lines = (self.node.layout.run / f"{role}.starts").read_text().splitlines()
        except FileNotFoundError:
            return []
        found = [(float(a), int(b)) for a, b in (line.split() for line in lines)]
        self.pids.update(pid for _, pid in found)
        return found

    def running(self, role: str) -> int:
        """The pid that plays the role; 0 while none does."""
        process = processes.recorded(self.node.layout.process(role))
        alive = process is not None and processes.alive(process, self.clock.boot_id())
        known = [pid for _, pid in self.starts(role)]
        return process.pid if process is not None and alive and process.pid in known else 0

    def both(self) -> bool:
        return all(self.running(role) for role in LINES)

    def alive(self, role: str) -> list[int]:
        return [pid for _, pid in self.starts(role) if processes.start_time(pid) is not None]

    def end(self) -> None:
        for keeper in self.keepers:
            keeper.kill()
            keeper.wait()
        for role in LINES:
            self.starts(role)
        for pid in self.pids:
            if processes.start_time(pid) is not None and self._is_ours(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _is_ours(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return str(self.node.layout.state).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        return False


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + WITHIN_S
    while not true():
        assert time.monotonic() < end, "it did not come to it in time"
        time.sleep(0.02)


@pytest.fixture
def kept(node: Node) -> Iterator[Kept]:
    made = Kept(node, STEADY)
    yield made
    made.end()
    shutil.rmtree(node.layout.state, ignore_errors=True)


@pytest.fixture
def crashing(node: Node) -> Iterator[Kept]:
    made = Kept(node, CRASH)
    yield made
    made.end()


def test_both_roles_are_started_and_an_ended_one_again(kept: Kept) -> None:
    kept.keep()
    until(kept.both)
    first, other = kept.running("agent"), kept.running("updater")
    os.kill(first, signal.SIGKILL)
    until(lambda: kept.running("agent") not in (0, first))
    assert kept.running("updater") == other
    assert [len(kept.alive(role)) for role in LINES] == [1, 1]


def test_a_killed_keeper_leaves_the_daemons_and_the_next_one_adopts_them(kept: Kept) -> None:
    keeper = kept.keep()
    until(kept.both)
    pids = [kept.running(role) for role in LINES]
    keeper.kill()
    keeper.wait()
    assert [kept.running(role) for role in LINES] == pids
    second = kept.keep()
    until(lambda: (p := processes.recorded(kept.node.layout.process("keep"))) and p.pid == second.pid)
    time.sleep(0.3)
    assert [kept.running(role) for role in LINES] == pids
    assert [len(kept.alive(role)) for role in LINES] == [1, 1]
    os.kill(pids[0], signal.SIGKILL)  # an adopted one is looked after like its own
    until(lambda: kept.running("agent") not in (0, pids[0]))
    assert [len(kept.alive(role)) for role in LINES] == [1, 1]


def test_a_second_keeper_leaves_at_once(kept: Kept) -> None:
    kept.keep()
    until(kept.both)
    assert kept.keep().wait(WITHIN_S) == 4
    assert [len(kept.alive(role)) for role in LINES] == [1, 1]


def test_term_ends_all(kept: Kept) -> None:
    keeper = kept.keep()
    until(kept.both)
    keeper.terminate()
    assert keeper.wait(WITHIN_S) == 0
    assert [kept.alive(role) for role in LINES] == [[], []]
    recorded = processes.recorded(kept.node.layout.process("keep"))
    assert recorded is None or processes.start_time(recorded.pid) != recorded.started


def test_a_crash_loop_has_a_floor_and_hup_skips_the_wait(crashing: Kept) -> None:
    keeper = crashing.keep()
    until(lambda: len(crashing.starts("agent")) >= 4)
    times = [at for at, _ in crashing.starts("agent")]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert all(gap >= 0.2 for gap in gaps[1:]), gaps  # the first restart comes at once
    until(lambda: len(crashing.starts("agent")) >= 5)
    began = time.monotonic()
    for _ in range(7):  # whose waits, from 0.8 s to 5 s each at least, would be 25 s
        count = len(crashing.starts("agent"))
        keeper.send_signal(signal.SIGHUP)
        until(lambda count=count: len(crashing.starts("agent")) > count)  # type: ignore[misc]
    assert time.monotonic() - began < 25.0


def test_a_role_that_somebody_else_plays_is_waited_for_quietly(kept: Kept) -> None:
    """As while a recovery core has the updater's role: no launcher is started to say so."""
    lock = RoleLock(kept.node.layout.role_lock("updater"))
    with lock:
        lock.acquire(1.0)
        keeper = kept.keep(subprocess.PIPE)
        until(lambda: kept.running("agent"))
        time.sleep(3.0)
        assert kept.starts("updater") == []
        assert (kept.node.layout.run / "updater.log").exists() is False
    until(lambda: kept.running("updater"))
    keeper.terminate()
    _, said = keeper.communicate(timeout=WITHIN_S)
    assert said.decode().splitlines() == ["instar keep: another process is this node's updater"]
