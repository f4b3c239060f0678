"""host.strays and the services, with real processes: who is a stray, who is not, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from instar.core.errors import MachineError
from instar.host import processes, strays
from instar.host.clock import Clock
from instar.host.layout import Layout
from instar.host.processes import Process
from instar.host.services import by_name
from instar_lab import machine

MEEK = """
import sys, time
print("up", flush=True)
time.sleep(120)
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + MEEK
FORKING = """
import os, time
if os.fork() == 0:
    time.sleep(120)
print("up", flush=True)
time.sleep(120)
"""
SEARCH = f"""
import sys
sys.path[:0] = {[path for path in sys.path if path]!r}
from pathlib import Path
from instar.host import strays
from instar.host.clock import Clock
from instar.host.layout import Layout
boot_id = Clock().boot_id()
found = strays.find(Layout(Path(sys.argv[3])), "agent", boot_id)
"""
EDITOR = MEEK  # a program that was only given the path to look at


class Nest:
    """A state folder, and processes that run from it or about it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.layout, self.boot_id = folder, Layout(folder / "state"), Clock().boot_id()
        for place in (self.layout.run, self.layout.launcher.parent, folder / "other"):
            place.mkdir(parents=True)
        self.pyz = self.layout.launcher
        self.pyz.write_text(MEEK)
        self.begun: list[subprocess.Popen[bytes]] = []

    def run(self, *words: object, cwd: Path | None = None, text: str = MEEK) -> int:
        """Start a process, wait until it is up; its pid."""
        self.pyz.write_text(text)
        begun = subprocess.Popen(
            [str(word) for word in words], stdout=subprocess.PIPE, cwd=cwd or "/", start_new_session=True
        )
        self.begun.append(begun)
        assert begun.stdout is not None
        assert begun.stdout.readline() == b"up\n"
        return begun.pid

    def python(self, *words: object, cwd: Path | None = None, text: str = MEEK) -> int:
        return self.run(sys.executable, *words, cwd=cwd, text=text)

    def agent(self, text: str = MEEK) -> int:
        return self.python("-I", "-S", self.pyz, "agent", "--state", self.layout.state, text=text)

    def record(self, pid: int) -> None:
        started = processes.start_time(pid)
        assert started is not None
        processes.record(self.layout.process("agent"), Process(pid, started, self.boot_id, "1.0.0-0"))

    def found(self, role: str = "agent") -> list[int]:
        return [stray.pid for stray in strays.find(self.layout, role, self.boot_id)]

    def lives(self, pid: int) -> bool:
        return processes.start_time(pid) is not None

    def close(self) -> None:
        for begun in self.begun:
            begun.kill()
            begun.wait()
            if begun.stdout:
                begun.stdout.close()
        machine.end_all_naming(self.folder, grace_s=0.5)


@pytest.fixture
def nest(folder: Path) -> Iterator[Nest]:
    made = Nest(folder)
    yield made
    made.close()


def test_whoever_plays_the_role_for_this_folder_is_found(nest: Nest) -> None:
    state = nest.layout.state
    (nest.folder / "copy.pyz").write_text(MEEK)
    link = nest.folder / "link"
    link.symlink_to(state)
    pids = [
        nest.agent(),
        nest.python(nest.pyz, "launch", "agent", "--state", state),
        nest.python("-X", "no_debug_ranges", "-Werror", nest.pyz, "agent", "--log", "json", "--state", state),
        nest.python("-ISX", "utf8", nest.pyz, "agent", f"--state={state}"),
        nest.python(nest.pyz, "agent", "--stat", f"{state}/"),
        nest.python("launcher/instar.pyz", "agent", "--state", ".", cwd=state),
        nest.python(nest.folder / "copy.pyz", "agent", "--state", link),
    ]
    assert nest.found() == pids
    assert nest.found("updater") == []


def test_everybody_else_is_left_alone(nest: Nest) -> None:
    state, other = nest.layout.state, nest.folder / "other"
    editor = nest.folder / "editor.py"
    editor.write_text(EDITOR)
    tail = nest.folder / "tail"
    tail.symlink_to("/usr/bin/env")
    for words in (
        (nest.pyz, "agent", "--state", other),  # another node's
        (nest.pyz, "agent", "--rehearse", "--state", state, "--tx", "tx-1"),
        (nest.pyz, "agent", "--reh", "--state", state),
        (nest.pyz, "updater", "--state", state),
        (nest.pyz, "runner", "--state", state, "agent"),
        (nest.pyz, "guard", "agent", "--state", state),
        (nest.pyz, "keep", "--state", state),
        (nest.pyz, "agent"),
        (editor, nest.pyz, "agent", "--state", state),
        (editor, "agent", "--state", state),
        ("-c", MEEK, nest.pyz, "agent", "--state", state),
    ):
        nest.python(*words)
    shell = f"echo up; sleep 120; : {nest.pyz} agent --state {state}"
    nest.run("/bin/sh", "-c", shell, nest.pyz, "agent", "--state", state)
    assert nest.found() == []


def test_the_recorded_one_and_what_it_forked_are_no_strays(nest: Nest) -> None:
    recorded = nest.agent(FORKING)
    nest.record(recorded)
    stray = nest.agent()
    assert nest.found() == [stray]
    own = [pid for pid in strays._pids() if processes.start_time(pid) and strays._parent(pid) == recorded]
    assert len(own) == 1, "the fork has the same command line"


def test_a_record_of_a_process_that_is_gone_spares_nobody(nest: Nest) -> None:
    stray = nest.agent()
    processes.record(nest.layout.process("agent"), Process(stray, 1, nest.boot_id, ""))
    assert nest.found() == [stray]


def test_term_then_kill_and_proof(nest: Nest) -> None:
    meek, stubborn = nest.agent(), nest.agent(STUBBORN)
    found = strays.find(nest.layout, "agent", nest.boot_id)
    began = time.monotonic()
    assert strays.end(found, nest.boot_id, grace_s=2.0) == {meek: "stopped", stubborn: "killed"}
    assert time.monotonic() - began < 20.0
    assert not nest.lives(meek)
    assert not nest.lives(stubborn)
    assert strays.end(found, nest.boot_id, grace_s=0.5) == {meek: "gone", stubborn: "gone"}


def test_another_process_with_that_number_is_not_hit(nest: Nest) -> None:
    pid = nest.agent()
    (found,) = strays.find(nest.layout, "agent", nest.boot_id)
    former = Process(found.pid, found.started - 1, nest.boot_id)
    assert strays.end([former], nest.boot_id, grace_s=0.1) == {pid: "gone"}
    assert nest.lives(pid)


LOCKING = """
import fcntl, os, sys
lock = os.open(f"{sys.argv[3]}/run/agent.lock", os.O_RDWR | os.O_CREAT, 0o644)
fcntl.flock(lock, fcntl.LOCK_EX)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user")
def test_of_a_process_that_may_do_more_the_roles_lock_tells_and_what_cannot_be_ended_is_told(
    nest: Nest,
) -> None:
    """As the updater's unit without CAP_SYS_PTRACE sees an agent with more rights."""
    for path in (nest.folder, *nest.folder.rglob("*")):
        path.chmod(0o755)
    nest.agent()
    holder = nest.agent(LOCKING + MEEK)
    assert nest.lives(holder)
    assert as_nobody(lambda: nest.found()) == [holder]
    found = strays.find(nest.layout, "agent", nest.boot_id)

    def end() -> str:
        try:
            strays.end(found, nest.boot_id, 0.1, 0.1)
        except MachineError as error:
            return error.code
        return ""

    assert as_nobody(end) == "not-gone"
    assert nest.lives(holder)


def as_nobody(do: Callable[[], Any]) -> Any:
    """Done by a child that has given up being root."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            os.write(writer, json.dumps(do()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(said)


@pytest.mark.parametrize("manager", ["keeper", "bare"])
def test_stopping_a_role_ends_its_strays(nest: Nest, manager: str) -> None:
    recorded, stray = nest.agent(), nest.agent()
    nest.record(recorded)
    other = nest.python(nest.pyz, "agent", "--state", nest.folder / "other")
    by_name(manager, nest.layout, Clock()).stop("agent")
    assert not nest.lives(recorded)
    assert not nest.lives(stray)
    assert nest.lives(other)


def test_a_mount_namespace_of_its_own_has_a_folder_of_its_own(nest: Nest) -> None:
    """As a node in a container: the same words, and another folder behind them."""
    state = nest.layout.state
    command = f"mount -t tmpfs none {state} && mkdir {state}/run && exec {sys.executable} {nest.folder}/copy.pyz agent --state {state}"
    (nest.folder / "copy.pyz").write_text(MEEK)
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespace to be had here")
    outside = nest.agent()
    inside = nest.run("unshare", "-m", "/bin/sh", "-c", command)
    assert nest.found() == [outside]
    assert nest.lives(inside)


def test_nobody_is_a_stray_of_its_own_search(nest: Nest) -> None:
    """The one who searches, and whoever started it, may be of the role itself."""
    nest.pyz.write_text(SEARCH + "print(len(found))\n")
    words = [sys.executable, str(nest.pyz), "agent", "--state", str(nest.layout.state)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True, cwd=os.sep)
    assert done.stdout == "0\n"
