"""host.processes, with real children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from instar.host import processes
from instar.host.clock import Clock
from instar.host.processes import Process

BOOT = "boot-1"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
MEEK = "import time; print('up', flush=True); time.sleep(60)"


class Child:
    def __init__(self, text: str) -> None:
        self.popen = subprocess.Popen([sys.executable, "-I", "-S", "-c", text], stdout=subprocess.PIPE)
        assert self.popen.stdout is not None
        assert self.popen.stdout.readline() == b"up\n"
        started = processes.start_time(self.popen.pid)
        assert started is not None
        self.process = Process(self.popen.pid, started, BOOT)

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait()
        if self.popen.stdout:
            self.popen.stdout.close()


@pytest.fixture
def meek() -> Iterator[Child]:
    child = Child(MEEK)
    yield child
    child.end()


@pytest.fixture
def stubborn() -> Iterator[Child]:
    child = Child(STUBBORN)
    yield child
    child.end()


def test_this_process_is_alive_and_only_in_this_boot() -> None:
    me = processes.this_process(BOOT, "1.0.0-0123456789ab")
    assert me.pid == os.getpid()
    assert processes.alive(me, BOOT)
    assert not processes.alive(me, "boot-2")
    assert processes.open_pidfd(me, "boot-2") is None


def test_a_pid_used_again_is_another_process(meek: Child) -> None:
    stranger = replace(meek.process, started=meek.process.started - 1)
    assert not processes.alive(stranger, BOOT)
    assert processes.stop(stranger, BOOT, 1.0) == "gone"
    assert not processes.send(stranger, BOOT, signal.SIGKILL)
    assert processes.alive(meek.process, BOOT)


def test_a_record_survives_and_a_torn_one_is_none(tmp_path: Path) -> None:
    me = processes.this_process(BOOT, "1.0.0-0123456789ab")
    path = tmp_path / "agent.json"
    assert processes.recorded(path) is None
    processes.record(path, me)
    assert processes.recorded(path) == me
    for bad in (path.read_bytes()[:10], b"", b"[]", b"null", b'{"pid": 1}', b"\xff"):
        path.write_bytes(bad)
        assert processes.recorded(path) is None
    processes.forget(path)
    processes.forget(path)
    assert not path.exists()


def test_a_process_that_heeds_term_is_stopped(meek: Child) -> None:
    assert processes.stop(meek.process, BOOT, 30.0) == "stopped"
    assert meek.popen.wait(1) == -signal.SIGTERM


def test_a_process_that_ignores_term_is_killed_after_the_grace(stubborn: Child) -> None:
    began = time.monotonic()
    assert processes.stop(stubborn.process, BOOT, 0.2) == "killed"
    assert 0.2 <= time.monotonic() - began < 20.0
    assert stubborn.popen.wait(1) == -signal.SIGKILL
    assert processes.stop(stubborn.process, BOOT, 0.2) == "gone"


def test_a_zombie_is_gone(meek: Child) -> None:
    fd = processes.open_pidfd(meek.process, BOOT)
    assert fd is not None
    assert not processes.wait_gone(fd, 0.0)
    meek.popen.kill()
    assert processes.wait_gone(fd, 30.0)  # ended, but nobody has waited for it
    os.close(fd)
    assert processes.start_time(meek.popen.pid) is None
    assert not processes.alive(meek.process, BOOT)
    assert processes.stop(meek.process, BOOT, 1.0) == "gone"


def test_a_signal_reaches_exactly_the_process(meek: Child) -> None:
    assert processes.send(meek.process, BOOT, signal.SIGTERM)
    meek.popen.wait(30)
    assert not processes.send(meek.process, BOOT, signal.SIGTERM)


def test_a_program_name_with_brackets_and_blanks_does_not_confuse(tmp_path: Path) -> None:
    odd = tmp_path / "a) R 1 (b"
    odd.symlink_to("/bin/sleep")
    child = subprocess.Popen([str(odd), "30"])
    try:
        assert processes.start_time(child.pid) == processes.start_time(child.pid)
        assert (
            processes.stop(Process(child.pid, processes.start_time(child.pid) or 0, BOOT), BOOT, 30.0)
            == "stopped"
        )
    finally:
        child.kill()
        child.wait()


def test_a_boot_began_with_process_1() -> None:
    clock = Clock()
    assert 0.0 <= clock.booted() <= clock.boottime()
    assert clock.booted() == pytest.approx((processes.start_time(1) or 0) / os.sysconf("SC_CLK_TCK"))
