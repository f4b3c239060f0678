"""host.services by hand: restarts with real processes, without a keeper and with ours.

The managers themselves are in tests/os/test_run_methods.py, with the real thing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import instar
from instar.core.errors import MachineError
from instar.host import processes
from instar.host.clock import Clock
from instar.host.interpreter import FLAGS
from instar.host.layout import LINES
from instar.host.line import Line
from instar.host.services import ByHand, by_name, running
from instar.host.services.bare import Bare, further
from instar.host.services.base import RoleLockProbe
from instar.host.services.detect import detect
from instar_lab import machine
from tests.node.world import Node, build, put

SOURCE = Path(instar.__file__).parents[1]
LAUNCHER = """
import sys
sys.path.insert(0, {source!r})
from instar.recovery import keep, launch
sys.exit({{"launch": launch, "keep": keep}}[sys.argv[1]].main(sys.argv[2:]))
"""
# Its lock is what the others wait for: all the rest is done by then.
STEADY = """
import fcntl, os, signal, sys, time
state = sys.argv[sys.argv.index("--state") + 1]
role = sys.argv[1]
def end(*_):
    with open(f"{state}/run/{role}.ends", "a") as log:
        log.write(f"{os.getpid()}\\n")
    time.sleep(0.1)
    os._exit(0)
signal.signal(signal.SIGTERM, end)
print("words", *sys.argv[1:], os.environ.get("OF_MINE"), file=sys.stderr, flush=True)
with open(f"{state}/run/{role}.starts", "a") as log:
    log.write(f"{os.getpid()}\\n")
lock = os.open(f"{state}/run/{role}.lock", os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(lock, fcntl.LOCK_EX)
time.sleep(120)
"""
WITHIN_S = 60.0


class Hand:
    """A node whose agent somebody starts by hand."""

    def __init__(self, node: Node, text: str = STEADY) -> None:
        self.layout, self.clock = node.layout, Clock()
        self.layout.launcher.parent.mkdir(parents=True, exist_ok=True)
        self.layout.launcher.write_text(LAUNCHER.format(source=str(SOURCE)))
        built = build("2.0.0", text)
        for role in LINES:
            line = Line(self.layout.line(role))
            put(line, built)
            line.activate(built.name, fallback="")

    def begin(self, *options: str, log: Path | None = None) -> subprocess.Popen[bytes]:
        state = str(self.layout.state)
        words = [
            sys.executable,
            *FLAGS,
            str(self.layout.launcher),
            "launch",
            "agent",
            "--state",
            state,
            *options,
        ]
        with (log or self.layout.run / "terminal").open("ab") as file:
            begun = subprocess.Popen(words, stderr=file, stdout=file, env={**os.environ, "OF_MINE": "kept"})
        probe = RoleLockProbe(self.layout.role_lock("agent"))
        machine.wait_for(
            lambda: self.pids()[-1:] == [begun.pid] and probe.held(), "an agent", WITHIN_S, every_s=0.01
        )
        return begun

    def pids(self, what: str = "starts", role: str = "agent") -> list[int]:
        try:
            return [int(line) for line in (self.layout.run / f"{role}.{what}").read_text().split()]
        except FileNotFoundError:
            return []

    def alive(self, role: str = "agent") -> list[int]:
        return [pid for pid in dict.fromkeys(self.pids(role=role)) if processes.start_time(pid) is not None]

    def bare(self) -> Bare:
        return Bare(self.layout, self.clock)

    def method(self) -> str:
        return detect(self.layout, self.clock)


@pytest.fixture
def hand(node: Node) -> Iterator[Hand]:
    made = Hand(node)
    yield made
    machine.end_all_naming(node.layout.state, grace_s=1.0)


# --- by hand, without a keeper


def test_by_hand_the_old_one_ends_before_the_new_one_runs_as_it_did(hand: Hand) -> None:
    log = hand.layout.run / "mine.log"
    old = hand.begin("--log", "json", log=log)
    assert hand.method() == "bare"
    running(hand.layout, hand.clock).restart("agent")
    assert old.wait(WITHIN_S) == 0
    new = processes.recorded(hand.layout.process("agent"))
    assert new is not None
    assert hand.alive() == [new.pid]
    assert hand.pids("ends") == [old.pid]
    assert os.getsid(new.pid) == new.pid
    machine.wait_for(
        lambda: log.read_text().count("words") == 2, "its words", WITHIN_S, log.read_text, every_s=0.01
    )
    first, second = log.read_text().splitlines()
    assert first == second == f"words agent --state {hand.layout.state} --log json kept"
    assert hand.method() == "bare"


def test_by_hand_two_at_once_make_no_two(hand: Hand) -> None:
    hand.begin()
    most = 0
    callers = [threading.Thread(target=hand.bare().restart, args=("agent",)) for _ in range(4)]
    for caller in callers:
        caller.start()
    while any(caller.is_alive() for caller in callers):
        most = max(most, len(hand.alive()))
        time.sleep(0.002)
    assert most == 1
    assert len(hand.alive()) == 1
    assert len(hand.pids()) == 5  # one after the other
    assert set(hand.pids("ends")) == set(hand.pids()[:-1])


def test_by_hand_start_and_stop_change_nothing_the_second_time(hand: Hand) -> None:
    bare = hand.bare()
    bare.start("agent")
    bare.start("agent")
    assert len(hand.pids()) == 1
    bare.stop("agent")
    bare.stop("agent")
    assert hand.alive() == []
    bare.restart("agent")
    assert len(hand.alive()) == 1


def test_by_hand_killed_in_between_the_next_one_starts_it(hand: Hand) -> None:
    """The restart's own process dies after the old agent's end; the lock goes with it."""
    old = hand.begin()
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from instar.host.clock import Clock\n"
        "from instar.host.layout import Layout\n"
        "from instar.host.services.bare import Bare\n"
        "class Dying(Bare):\n"
        "    def _start(self, role, start): os.kill(os.getpid(), 9)\n"
        "Dying(Layout(Path(sys.argv[2])), Clock()).restart('agent')\n"
    )
    died = subprocess.run(
        [sys.executable, "-c", code, str(SOURCE), str(hand.layout.state)], check=False, timeout=WITHIN_S
    )
    assert died.returncode == -signal.SIGKILL
    assert old.wait(WITHIN_S) == 0
    assert hand.alive() == []
    hand.bare().restart("agent")
    assert len(hand.alive()) == 1


def test_by_hand_a_new_one_that_ends_is_told(node: Node) -> None:
    hand = Hand(node, "import sys; sys.exit('broken')")
    with pytest.raises(MachineError) as caught:
        hand.bare().start("agent")
    assert caught.value.code == "not-started"
    assert "status 1" in caught.value.text
    assert "broken" in (hand.layout.run / "agent.log").read_text()


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("python3 -I /x/instar.pyz agent --state /s", ""),
        ("python3 -I -S -X no_debug_ranges /x/instar.pyz agent --state /s --log json", "--log json"),
        ("python3 instar.pyz agent --log json --state /s --lock-within 3", "--log json --lock-within 3"),
        ("./instar.pyz launch agent --state /s", ""),
        ("something else", ""),
        ("instar.pyz agent --state", ""),
    ],
)
def test_further_words(line: str, kept: str) -> None:
    assert further(line.split()) == kept.split()


# --- by our keeper


def keep(hand: Hand, *options: str) -> subprocess.CompletedProcess[str]:
    words = [
        sys.executable,
        *FLAGS,
        str(hand.layout.launcher),
        "keep",
        "--state",
        str(hand.layout.state),
        *options,
    ]
    return subprocess.run(words, capture_output=True, text=True, timeout=WITHIN_S, check=False)


@pytest.mark.parametrize(
    ("by", "method"), [((), "keeper"), (("--by", "sysv"), "sysv"), (("--by", "openrc"), "openrc")]
)
def test_keeper_as_scripts_use_it(hand: Hand, by: tuple[str, ...], method: str) -> None:
    assert (keep(hand, "--check").returncode, keep(hand, *by, "--end").returncode) == (3, 0)
    assert keep(hand, *by, "--detach").returncode == 0
    machine.wait_for(lambda: all(hand.alive(role) for role in LINES), "both", WITHIN_S, every_s=0.01)
    assert keep(hand, "--check").stdout == "instar is running\n"
    assert hand.method() == method
    assert keep(hand, *by, "--detach").returncode == 0  # once more: nothing happens
    old, other = hand.alive(), hand.alive("updater")
    by_name("keeper", hand.layout, hand.clock).restart("agent")
    machine.wait_for(lambda: hand.alive() not in ([], old), "a new agent", WITHIN_S, every_s=0.01)
    assert hand.alive("updater") == other
    assert hand.method() == method

    keeper = processes.recorded(hand.layout.process("keep"))
    assert keeper is not None
    os.kill(keeper.pid, signal.SIGKILL)  # the agent runs on, kept by nobody
    machine.wait_for(lambda: processes.start_time(keeper.pid) is None, "its end", WITHIN_S, every_s=0.01)
    assert hand.method() == "bare"
    assert keep(hand, *by, "--detach").returncode == 0
    assert hand.method() == method  # adopted: the keeper is not its parent
    assert keep(hand, *by, "--end").returncode == 0
    assert [hand.alive(role) for role in LINES] == [[], []]
    assert keep(hand, "--check").returncode == 3


def test_keeper_that_takes_its_time_is_waited_for(hand: Hand) -> None:
    """On a small machine that has just booted."""
    hand.layout.launcher.write_text(f"import time\ntime.sleep(3.5)\n{hand.layout.launcher.read_text()}")
    assert keep(hand, "--detach").returncode == 0
    assert keep(hand, "--end").returncode == 0


def test_keeper_that_is_not_recorded_yet_is_ended_too(hand: Hand) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from instar.host import processes\n"
        "from instar.host.clock import Clock\n"
        "from instar.host.layout import Layout\n"
        "from instar.host.locks import RoleLock\n"
        "layout = Layout(Path(sys.argv[2]))\n"
        "with RoleLock(layout.role_lock('keep')) as lock:\n"
        "    lock.acquire(1.0); print('up', flush=True); time.sleep(0.5)\n"
        "    processes.record(layout.process('keep'), processes.this_process(Clock().boot_id()))\n"
        "    time.sleep(120)\n"
    )
    words = [sys.executable, "-c", code, str(SOURCE), str(hand.layout.state)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as keeper:
        try:
            assert keeper.stdout is not None
            assert keeper.stdout.readline() == b"up\n"
            ByHand(hand.layout, hand.clock).end_keeper()
            assert keeper.poll() == -signal.SIGTERM
        finally:
            keeper.kill()


def test_keeper_that_cannot_start_is_told(hand: Hand) -> None:
    hand.layout.launcher.unlink()
    code = "import sys; sys.path.insert(0, sys.argv[1]); from instar.recovery.keep import main; sys.exit(main(sys.argv[2:]))"
    words = [sys.executable, "-c", code, str(SOURCE), "--state", str(hand.layout.state), "--detach"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    assert done.returncode == 4
    assert "keeper.log" in done.stderr


@pytest.mark.parametrize(
    "words", [[], ["--state"], ["--state", "/x", "--moon"], ["--by", "sysv"], ["--detach"]]
)
def test_keeper_refuses_bad_words(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from instar.recovery import keep as module

    assert module.main(words) == 2
    assert "usage: instar keep" in capsys.readouterr().err
