"""A mark that a process hands down to all its descendants: for machines where cgroups are not ours to use.

The mark is a number in the resource limit RTTIME, which means nothing to a process that has no real-time
priority. A descendant keeps it through fork, exec, setsid and the death of its parents; only one with
the right to raise limits can take it off. /proc/<pid>/limits shows it.

What is found is signalled through a pidfd, and the mark is looked at once more in between: so a
number that became another's is never hit. Standard library only, few imports.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from pathlib import Path

from instar.host.processes import start_time

BASE = 1 << 56  # microseconds of real-time priority without a wait: two thousand years
FIELD = b"Max realtime timeout"
ROUNDS = 50  # of looking and killing, against what forks meanwhile
REST_S = 0.002


class Mark:
    """One run's mark. `value` is unique among the live runs of this machine."""

    def __init__(self, value: int) -> None:
        self.value = value

    @classmethod
    def unique(cls, number: int) -> Mark:
        """For this process's run `number`; that of another process, or of this one's next run, differs."""
        return cls(BASE | (os.getpid() & 0x3FFFFF) << 32 | (number & 0xFFFFFFFF))

    def put(self, pid: int) -> None:
        """Mark `pid`, before it has children. Raises OSError where that is not allowed."""
        resource.prlimit(pid, resource.RLIMIT_RTTIME, (self.value, self.value))

    def pids(self) -> list[int]:
        """Who bears it. Reads every process's limits: about 10 microseconds for each."""
        names = [name for name in os.listdir("/proc") if name.isdigit()]
        return [pid for name in names if self._is_on(pid := int(name))]

    def kill(self) -> bool:
        """Kill all who bear it; whether nobody is left. Stopped first, so that they do not fork meanwhile."""
        for number in range(ROUNDS):
            found = self.pids()
            if not found:
                return True
            for signal_number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in found:
                    self._send(pid, signal_number)
            time.sleep(REST_S if number else 0)
        return False

    def _send(self, pid: int, number: signal.Signals) -> None:
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                if self._is_on(pid):
                    signal.pidfd_send_signal(pidfd, number)
            finally:
                os.close(pidfd)

    def _is_on(self, pid: int) -> bool:
        try:
            limits = Path(f"/proc/{pid}/limits").read_bytes()
        except OSError:
            return False
        at = limits.find(FIELD)
        line = limits[at : limits.find(b"\n", at)] if at >= 0 else b""
        return b"%d" % self.value in line.split() and start_time(pid) is not None  # a zombie is gone
