"""Run one child of our own program to its end (renew, guard, fetch-module): bounded, without a thread.

Modules run in runners (spawn.py), not here.

The child gets its own session, a clean environment, no descriptor but 0, 1 and 2, and its request as
a file on descriptor 0. What it writes to 1 is bounded and kept; of 2 only the tail is. At the deadline
its whole process group is killed; so are its left-over children when it ends by itself.
asyncio's own subprocesses would cost a thread each and lose the child's resource usage.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

STDERR_TAIL = 4_096  # bytes
STDERR_MOST = 16 << 20  # bytes; a child that says more is ended
POLL_S = 0.02  # where the kernel has no pidfd
REAP_WITHIN_S = 5.0
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


class Ended(NamedTuple):
    """How a child ended. `cut` says why it was killed: '', 'deadline' or 'output'."""

    exit_code: int
    signal: int
    seconds: float
    max_rss: int  # bytes, of the child and the children it waited for
    output: bytes
    stderr: str
    cut: str = ""


class _Pipe:
    """The reading end of one of the child's outputs. `keep_head` keeps the start, else the tail is kept."""

    def __init__(self, most: int, kept: int, keep_head: bool) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.read_end, False)
        self.data = bytearray()
        self.seen = 0
        self._most, self._kept, self._keep_head = most, kept, keep_head

    @property
    def too_much(self) -> bool:
        return self.seen > self._most

    def pull(self) -> bool:
        """Take what is there. False at the end, or when there is nothing more now."""
        try:
            chunk = os.read(self.read_end, 65_536)
        except BlockingIOError:
            return False
        self.seen += len(chunk)
        if self._keep_head:
            self.data += chunk[: max(0, self._kept - len(self.data))]
        else:
            self.data += chunk
            del self.data[: -self._kept]
        return bool(chunk)

    def close(self) -> None:
        for fd in (self.read_end, self.write_end):
            if fd >= 0:
                os.close(fd)
        self.read_end = self.write_end = -1


class _Child:
    def __init__(self, command: list[str], request: bytes, cwd: Path, most_output: int) -> None:
        self.cut = ""
        self.ended = asyncio.get_running_loop().create_future()
        self._pidfd = -1
        self._out = _Pipe(most_output, most_output, keep_head=True)
        self._err = _Pipe(STDERR_MOST, STDERR_TAIL, keep_head=False)
        self._started = time.monotonic()
        try:
            self._process = self._start(command, request, cwd)
        except BaseException:
            self._out.close()
            self._err.close()
            raise
        for pipe in (self._out, self._err):
            os.close(pipe.write_end)
            pipe.write_end = -1
            asyncio.get_running_loop().add_reader(pipe.read_end, self._readable, pipe)

    def _start(self, command: list[str], request: bytes, cwd: Path) -> subprocess.Popen[bytes]:
        stdin = os.memfd_create("request", os.MFD_CLOEXEC)
        try:
            view = memoryview(request)
            while view:
                view = view[os.write(stdin, view) :]
            os.lseek(stdin, 0, os.SEEK_SET)
            return subprocess.Popen(
                command,
                stdin=stdin,
                stdout=self._out.write_end,
                stderr=self._err.write_end,
                cwd=cwd,
                env=ENVIRONMENT,
                start_new_session=True,
            )
        finally:
            os.close(stdin)

    def _readable(self, pipe: _Pipe) -> None:
        if not pipe.pull():
            asyncio.get_running_loop().remove_reader(pipe.read_end)
        elif pipe.too_much:
            self.kill("output")

    def kill(self, why: str) -> None:
        """Kill the whole group. The child is not reaped yet, so the number cannot be another's."""
        if self._process.returncode is None:
            self.cut = self.cut or why
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def wait(self, within_s: float) -> bool:
        """Whether the child has ended (it is not reaped) within `within_s`."""
        if self._pidfd < 0 and not self.ended.done():
            self._watch()
        try:
            await asyncio.wait_for(asyncio.shield(self.ended), within_s)
        except TimeoutError:
            return False
        return True

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError:  # a kernel before 5.3, or a sandbox that forbids it
            self._poll(loop)
            return
        loop.add_reader(self._pidfd, self._mark_ended)

    def _poll(self, loop: asyncio.AbstractEventLoop) -> None:
        if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self._mark_ended()
        elif not self.ended.done():
            loop.call_later(POLL_S, self._poll, loop)

    def _mark_ended(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
        if not self.ended.done():
            self.ended.set_result(None)

    def reap(self) -> Ended:
        """Collect an ended child; blocks when it has not ended. Its left-over children are killed first."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        _, status, usage = os.wait4(self._process.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self._process.returncode = code
        for pipe in (self._out, self._err):
            while not pipe.too_much and pipe.pull():
                pass
        return Ended(
            exit_code=max(code, 0),
            signal=max(-code, 0),
            seconds=round(time.monotonic() - self._started, 4),
            max_rss=usage.ru_maxrss * 1024,
            output=bytes(self._out.data),
            stderr=self._err.data.decode("utf-8", "replace"),
            cut=self.cut or ("output" if self._out.too_much else ""),
        )

    def close(self) -> None:
        loop = asyncio.get_running_loop()
        for pipe in (self._out, self._err):
            if pipe.read_end >= 0:
                loop.remove_reader(pipe.read_end)
            pipe.close()
        if self._pidfd >= 0:
            loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


async def run_child(
    command: list[str], request: bytes, deadline_s: float, most_output: int, cwd: Path = Path("/")
) -> Ended:
    """Run `command` to its end. Returns how it ended, killed or not; raises OSError when it cannot start.

    Cancelled, it kills the group, reaps the child and passes the cancellation on.
    """
    child = _Child(command, request, cwd, most_output)
    try:
        if not await child.wait(deadline_s):
            child.kill("deadline")
            await child.wait(REAP_WITHIN_S)
        return child.reap()
    except asyncio.CancelledError:
        child.kill("cancelled")
        child.reap()
        raise
    finally:
        child.close()
