"""One runner process, from its start to the last descriptor. Whatever it does, the agent is not harmed.

A runner gets its own session, a fixed environment, /dev/null as descriptor 0, one pipe for 1 and 2, and
the control line as 3; nothing else. It has its place (places.py) before it is given its first line, so
nothing of a module runs outside of it. asyncio's own subprocesses would cost a thread each and lose the
child's resource usage.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from instar.agent.control import ControlLine, Tail
from instar.agent.places import Place

STDERR_TAIL = 4_096  # bytes
STDERR_MOST = 16 << 20  # bytes of one job; one that says more is ended
OUTPUT_SLACK = 16_384  # bytes
POLL_S = 0.02  # where the kernel has no pidfd
REAP_WITHIN_S = 5.0  # for a killed process to be gone
WASMTIME = "INSTAR_WASMTIME"  # as in runner/wasm.py
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CONTROL = 3  # the descriptor of the control line


class Outcome(NamedTuple):
    """How a runner ended. `cut` says why it was killed: '', or the word that `kill` was given.

    Words of our own: `output`, `processes`, `memory` (the kernel did it), `interrupted` (the fork server died).
    """

    exit_code: int
    signal: int
    seconds: float
    max_rss: int  # bytes, of the runner and the children it waited for, or of its whole cgroup
    cpu_s: float
    stderr: str  # its tail
    cut: str = ""


class Usage(NamedTuple):
    """`status` as wait(2) has it."""

    status: int
    max_rss: int
    cpu_s: float


class Child(Protocol):
    """A started process, cold or warm. `ended` is done when it has ended; only then `reap` has an answer."""

    pid: int
    ended: asyncio.Future[None]

    def kill(self) -> None: ...
    def reap(self) -> Usage | None: ...
    def close(self) -> None: ...
    def lost(self) -> bool: ...  # its end can no longer be known


class ColdChild:
    """Our own child."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._usage: Usage | None = None
        self._pidfd = open_pidfd(pid)
        if self._pidfd >= 0:
            asyncio.get_running_loop().add_reader(self._pidfd, self._mark)
        else:
            self._poll()

    def kill(self) -> None:
        if self._usage is None:  # not reaped, so the number is its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def reap(self) -> Usage | None:
        """None as long as it runs."""
        if self._usage is None:
            pid, status, used = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self._usage = Usage(status, used.ru_maxrss * 1024, round(used.ru_utime + used.ru_stime, 4))
        return self._usage

    def close(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def lost(self) -> bool:
        return False

    def _mark(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
        if not self.ended.done():
            self.ended.set_result(None)

    def _poll(self) -> None:
        if self._usage or os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self._mark()
        else:
            asyncio.get_running_loop().call_later(POLL_S, self._poll)


class Ends:
    """What a runner is to be given, and our ends of it: the control line and the stderr pipe."""

    def __init__(self) -> None:
        mine, self.line = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        read_end, self.stderr = os.pipe2(os.O_CLOEXEC)
        self.control, self.tail = ControlLine(mine), Tail(read_end, STDERR_TAIL)

    def given(self) -> None:
        """The runner has its ends: ours of them are closed, so that its end can be noticed."""
        if self.stderr >= 0:
            os.close(self.stderr)
            self.stderr = -1
        self.line.close()

    def close(self) -> None:
        self.given()
        self.control.close()
        self.tail.close()


class Run:
    """One runner process. Whoever has one must wait for its `outcome`, once."""

    def __init__(self, child: Child, ends: Ends, place: Place, over: Callable[[Run, bool], None]) -> None:
        """`over` is told when it has ended, and whether all of it is gone."""
        self._child, self._ends, self._place, self._over = child, ends, place, over
        self._cut = ""
        self.made = self._began = time.monotonic()
        self._watch: asyncio.TimerHandle | None = None
        self._outcome: Outcome | None = None
        self.used = False  # whether it was given its first line
        ends.control.too_much = ends.tail.too_much = self._too_much

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def warm(self) -> bool:
        return not isinstance(self._child, ColdChild)

    @property
    def over(self) -> bool:
        return self._child.ended.done()

    def begin(self, request: dict[str, Any], heed: Callable[[dict[str, Any]], None], began: float) -> None:
        """Give it its first line. `began` (monotonic) is when its time began to count."""
        limits = request.get("limits", {})
        memory, processes = int(limits.get("memory", 0)), int(limits.get("processes", 0))
        self._began, self.used = began, True
        self._place.limit(memory, processes)
        self._ends.control.heed = heed
        if request.get("do") != "serve":  # a service may speak for years; control.py bounds how fast
            output = int(limits.get("output", 0))  # the runner notices first, and can say so
            self._ends.control.most = output + OUTPUT_SLACK if output else 0
            self._ends.tail.most = STDERR_MOST
        if processes:
            self._look_later(processes)
        self._ends.control.say(request)

    def say(self, message: dict[str, Any]) -> None:
        """One line; dropped when it has ended."""
        self._ends.control.say(message)

    async def ended(self, within_s: float) -> bool:
        """Whether the process has ended within `within_s`; what it started may go on until `outcome`."""
        if not self._child.ended.done():
            await asyncio.wait([self._child.ended], timeout=within_s)
        return self._child.ended.done()

    def kill(self, why: str) -> None:
        """Kill it and all that it started, at once. The first `why` ends up in Outcome.cut."""
        if not self._child.ended.done():
            self._cut = self._cut or why
            self._child.kill()
            self._place.kill()

    async def outcome(self) -> Outcome:
        """End what is left of it, reap it, close all. Kills one that still runs. Idempotent.

        One that the kernel does not let go of within REAP_WITHIN_S is left to `over`, and counts as killed.
        """
        if self._outcome is not None:
            return self._outcome
        self.kill("left")
        gone = await self.ended(REAP_WITHIN_S)
        if self._watch is not None:
            self._watch.cancel()
        ending = await self._place.leave()
        self._ends.control.drain()
        self._ends.tail.drain()
        usage = self._child.reap() if gone else None
        used = usage or Usage(signal.SIGKILL, 0, 0.0)
        code = os.waitstatus_to_exitcode(used.status)
        lost = "interrupted" if self._child.lost() else ""
        self._outcome = Outcome(
            exit_code=max(code, 0),
            signal=max(-code, 0),
            seconds=round(time.monotonic() - self._began, 4),
            max_rss=max(used.max_rss, ending.peak),
            cpu_s=used.cpu_s,
            stderr=self._ends.tail.text(),
            cut=self._cut or ("memory" if ending.out_of_memory else lost),
        )
        self._ends.close()
        if usage is not None or lost:
            self._child.close()
        self._over(self, gone and ending.clean)
        return self._outcome

    async def end_late(self) -> bool:
        """For one that was not gone in time: whether it is now, with all that it started."""
        if self._child.reap() is None and not self._child.lost():
            return False
        self._child.close()
        return (await self._place.leave()).clean

    def _too_much(self) -> None:
        if self._child.ended.done():
            self._cut = self._cut or "output"
        self.kill("output")

    def _look_later(self, processes: int) -> None:
        loop = asyncio.get_running_loop()
        self._watch = loop.call_later(self._place.watch_s, self._look, processes)

    def _look(self, processes: int) -> None:
        if self._child.ended.done():
            return
        if self._place.too_many(processes):
            self.kill("processes")
        else:
            self._look_later(processes)


def environment_of_all() -> dict[str, str]:
    """What every runner gets: nothing of ours, but where the configuration says that wasmtime is."""
    given = os.environ.get(WASMTIME)
    return {"PATH": PATH, "LANG": "C.UTF-8", **({WASMTIME: given} if given else {})}


def start_cold(command: list[str], ends: Ends, cwd: Path, name: str) -> ColdChild:
    """Start `command` as a runner. Raises OSError, with nothing started."""
    environment = {**environment_of_all(), "HOME": str(cwd), "TMPDIR": str(cwd), "INSTAR_MODULE": name}
    return ColdChild(spawn(command, ends.line.fileno(), ends.stderr, cwd, environment))


def spawn(command: list[str], control: int, stderr: int, cwd: Path, environment: dict[str, str]) -> int:
    """Start `command` in `cwd`, with a session of its own and descriptors 0 to 3 alone; its pid.

    posix_spawn does not copy our memory's tables, as fork would, and runs no Python in between. It has no
    working directory of its own: so ours is changed for that moment (we have no threads that would care).
    """
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    here = os.open(".", os.O_PATH | os.O_CLOEXEC)
    try:
        os.chdir(cwd)
        return os.posix_spawn(
            command[0],
            command,
            environment,
            file_actions=_descriptors(null, control, stderr),
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),  # Python ignores these two, and hands that down
        )
    finally:
        os.fchdir(here)
        os.close(here)
        os.close(null)


def _descriptors(null: int, control: int, stderr: int) -> list[tuple[Any, ...]]:
    """What becomes of the descriptors: ours close by themselves, but somebody may have handed us others.

    The three that are given are moved out of the way first: one of them may have a number below four.
    """
    taken = (control, stderr, null)
    free = [fd for fd in range(CONTROL + 1, CONTROL + 2 * len(taken) + 1) if fd not in taken][: len(taken)]
    moves: list[tuple[Any, ...]] = [
        (os.POSIX_SPAWN_DUP2, old, new) for old, new in zip(taken, free, strict=True)
    ]
    places = [(free[2], 0), (free[1], 1), (free[1], 2), (free[0], CONTROL)]
    moves += [(os.POSIX_SPAWN_DUP2, old, new) for old, new in places]
    moves += [(os.POSIX_SPAWN_CLOSE, fd) for fd in free]
    return moves + [(os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable(above=CONTROL)]


def _inheritable(above: int) -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            if (fd := int(name)) > above and os.get_inheritable(fd):
                found.append(fd)
    return found


def open_pidfd(pid: int) -> int:
    """-1 where the kernel has none (before 5.3), or a sandbox forbids it."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1
