"""A mark that a process hands down to all its descendants: for machines where cgroups are not ours to use.

The mark is a number in the resource limit RTTIME, which means nothing to a process that has no real-time
priority. A descendant keeps it through fork, exec, setsid and the death of its parents; only one with
the right to raise limits can take it off. /proc/<pid>/limits shows it.

What is found is signalled through a pidfd, and the mark is looked at once more in between: so a
number that became another's is never hit. What leaves its session at each fork, and forks faster than it can
be looked for, ends only with a cgroup, or with the process limit of a user that is not root.
Standard library only, few imports.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from instar.host.processes import start_time

BASE = 1 << 56  # microseconds of real-time priority without a wait: two thousand years
FIELD = b"Max realtime timeout"
KILL_WITHIN_S = 1.0  # of looking and killing, against what forks meanwhile
REST_S = 0.002
MOST_FORKS = 200_000  # in a second, on any machine


class Mark:
    """One run's mark. `value` is unique among the live runs of this machine."""

    def __init__(self, value: int) -> None:
        self.value = value
        self._pid, self._put_at = 0, 0.0

    @classmethod
    def unique(cls, number: int) -> Mark:
        """For this process's run `number`; that of another process, or of this one's next run, differs."""
        return cls(BASE | (os.getpid() & 0x3FFFFF) << 32 | (number & 0xFFFFFFFF))

    def put(self, pid: int) -> None:
        """Mark `pid`, before it has children. Raises OSError where that is not allowed."""
        resource.prlimit(pid, resource.RLIMIT_RTTIME, (self.value, self.value))
        self._pid, self._put_at = pid, time.monotonic()

    def pids(self) -> Iterator[int]:
        """Who bears it, as they are found. Reads the limits of all that may: about 20 microseconds for each."""
        numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return filter(self._is_on, filter(self._younger(), numbers))

    def kill(self) -> bool:
        """Kill all who bear it; whether nobody is left. Stopped first, so that they do not fork meanwhile.

        What forks fast takes the processor from us as well: so we go before everybody else, if we may.
        """
        if not any(self.pids()):
            return True
        end = time.monotonic() + KILL_WITHIN_S
        with _first_in_line():
            while found := [pid for pid in self.pids() if self._send(pid, signal.SIGSTOP)]:
                for pid in found:
                    self._send(pid, signal.SIGKILL)
                if time.monotonic() >= end:
                    return False
                time.sleep(REST_S)  # to let them die
        return True

    def _younger(self) -> Callable[[int], bool]:
        """Whether a process may be a descendant, by its number alone: the kernel hands numbers out in turn.

        So descendants lie between the marked one and the newest, around the end if need be, unless there
        was time to go all the way around.
        """
        try:
            newest = int(Path("/proc/loadavg").read_bytes().split()[4])
            most = int(Path("/proc/sys/kernel/pid_max").read_bytes())
        except (OSError, ValueError, IndexError):
            return lambda _: True
        first = self._pid
        if not first or (time.monotonic() - self._put_at) * MOST_FORKS > most - 1000:
            return lambda _: True
        if newest >= first:
            return lambda pid: first <= pid <= newest
        return lambda pid: pid >= first or pid <= newest

    def _send(self, pid: int, number: signal.Signals) -> bool:
        """Whether it was there."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return False
        try:
            if not self._is_on(pid):
                return False
            signal.pidfd_send_signal(pidfd, number)
        except OSError:
            return False
        finally:
            os.close(pidfd)
        return True

    def _is_on(self, pid: int) -> bool:
        try:
            limits = Path(f"/proc/{pid}/limits").read_bytes()
        except OSError:
            return False
        at = limits.find(FIELD)
        line = limits[at : limits.find(b"\n", at)] if at >= 0 else b""
        return b"%d" % self.value in line.split() and start_time(pid) is not None  # a zombie is gone


@contextlib.contextmanager
def _first_in_line() -> Iterator[None]:
    """Run before all that has no real-time priority. Not ours to have, mostly, unless we are root."""
    policy, param = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, param)
