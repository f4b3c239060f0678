"""Runs of the stand-in runner (speaking.py): cold or warm, in a cgroup or by mark."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from instar.agent.runners import Runners
from instar.agent.spawn import Outcome, Run
from instar.host import cgroups

COMMAND = [sys.executable, "-I", "-S", str(Path(__file__).with_name("speaking.py"))]
GROUPED = cgroups.find() is not None
LIMITS = {"processes": 20, "output": 1 << 20, "memory": 0}


class Done(NamedTuple):
    run: Run
    said: list[dict[str, Any]]
    outcome: Outcome


def request(code: str, do: str = "run", name: str = "test", **limits: int) -> dict[str, Any]:
    return {
        "v": 1,
        "do": do,
        "module": {"name": name},
        "args": {"code": code},
        "limits": {**LIMITS, **limits},
    }


async def run(
    runners: Runners,
    code: str,
    warm: bool = True,
    within_s: float = 60.0,
    cwd: Path = Path("/tmp"),
    **limits: int,
) -> Done:
    """Start, wait, and take the outcome; killed with the word 'deadline' after `within_s`."""
    said: list[dict[str, Any]] = []
    started = await runners.start(request(code, **limits), said.append, cwd, warm)
    if not await started.ended(within_s):
        started.kill("deadline")
    return Done(started, said, await started.outcome())


def descriptors() -> set[str]:
    return {name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}


_earlier: set[int] = set()


def children() -> list[int]:
    """Of this process, zombies included; not those that were there when the test began, as a server that other tests
    of this worker share."""
    return [pid for pid in _children() if pid not in _earlier]


def mark_children() -> None:
    """A test begins."""
    _earlier.clear()
    _earlier.update(_children())


def _children() -> list[int]:
    own = os.getpid()
    return [int(n) for n in Path(f"/proc/{own}/task/{own}/children").read_text().split()]


def is_gone(pid: int) -> bool:
    """Ended; a zombie whose parent is slow to reap it counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except OSError:
        return True


async def until_gone(pid: int, within_s: float = 60.0) -> None:
    end = time.monotonic() + within_s
    while not is_gone(pid):
        assert time.monotonic() < end, f"process {pid} is still there"
        await asyncio.sleep(0.01)


async def until(true: Callable[[], object], what: str, within_s: float = 60.0) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, f"expected {what} within {within_s:g} s"
        await asyncio.sleep(0.01)


async def until_file(path: Path, within_s: float = 60.0) -> str:
    end = time.monotonic() + within_s
    while not path.exists() or not path.read_text():
        assert time.monotonic() < end, f"{path} was not written"
        await asyncio.sleep(0.01)
    return path.read_text()
