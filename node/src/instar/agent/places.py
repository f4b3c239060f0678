"""Where a run is kept together, so that all it started ends with it: a cgroup leaf, or else a mark.

A process may leave its group and its session; it cannot leave its cgroup, and it keeps its mark
(host/marks.py). Every method may be called for a run that is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from itertools import islice

from instar.host.cgroups import Leaf
from instar.host.marks import Mark
from instar.host.processes import start_time

GONE_WITHIN_S = 1.0  # for killed processes to leave a group
POLL_S = 0.002
REMOVE_AFTER_S = 0.01


class Ending:
    """What the place knew about the run: `peak` in bytes, 0 when nobody counted."""

    def __init__(self, peak: int = 0, out_of_memory: bool = False, clean: bool = True) -> None:
        self.peak, self.out_of_memory, self.clean = peak, out_of_memory, clean


class GroupPlace:
    """A leaf of the cgroup tree."""

    def __init__(self, leaf: Leaf) -> None:
        self._leaf = leaf
        self.watch_s = 0.05  # between two looks at the number of processes

    def limit(self, memory: int, processes: int) -> None:
        self._leaf.limit(memory, processes)

    def put(self, pid: int) -> None:
        self._leaf.add(pid)

    def entrance(self) -> int:
        """A descriptor by which a runner comes in by itself, or -1."""
        try:
            return self._leaf.entrance()
        except OSError:
            return -1

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self._leaf.kill()

    def too_many(self, processes: int) -> bool:
        """Whether it has, or wanted, more than `processes`."""
        try:
            if self._leaf.limits_processes:
                return self._leaf.refused_forks() > 0
            return len(self._leaf.pids()) > processes
        except OSError:
            return False

    async def leave(self) -> Ending:
        """Kill what is left and remove the leaf. `clean` is false when that took too long."""
        peak, out_of_memory = 0, False
        if self._leaf.limits_memory:
            peak, out_of_memory = self._leaf.peak(), self._leaf.out_of_memory()
        loop = asyncio.get_running_loop()
        end = loop.time() + GONE_WITHIN_S
        while not self._is_empty():
            self.kill()
            if loop.time() >= end:
                return Ending(peak, out_of_memory, clean=False)
            await asyncio.sleep(POLL_S)
        if self._leaf.of_one_run:
            # The kernel takes a millisecond for it, for which no result should wait.
            loop.call_later(REMOVE_AFTER_S, self._leaf.remove, 0.0)
        else:  # the module's next process may be in a leaf of this name by then
            self._leaf.remove(0.0)
        return Ending(peak, out_of_memory)

    def _is_empty(self) -> bool:
        try:
            return not self._leaf.populated()
        except OSError:  # it was removed already
            return True


class MarkPlace:
    """The process group of the runner, and the mark for who has left it."""

    def __init__(self, mark: Mark) -> None:
        self._mark = mark
        self._pid = 0
        self._started: int | None = None
        self._marked = False
        self.watch_s = 0.05

    def limit(self, memory: int, processes: int) -> None:
        """The runner's own rlimits must do."""

    def entrance(self) -> int:
        return -1  # it is put where it is

    def put(self, pid: int) -> None:
        self._pid, self._started = pid, start_time(pid)
        with contextlib.suppress(OSError):  # a sandbox that forbids it: then the group must do
            self._mark.put(pid)
            self._marked = True

    def kill(self) -> None:
        """The group first: that is one act, and ends what forks faster than it can be looked for."""
        if self._pid and start_time(self._pid) in (None, self._started):  # gone, a zombie, or it still
            with contextlib.suppress(OSError):
                os.killpg(self._pid, signal.SIGKILL)
        if self._marked:
            self._mark.kill()

    def too_many(self, processes: int) -> bool:
        """Looks take longer where there are many processes; then they are made less often."""
        if not self._marked:
            return False
        loop = asyncio.get_running_loop()
        began = loop.time()
        count = sum(1 for _ in islice(self._mark.pids(), processes + 1))
        self.watch_s = max(0.05, 20 * (loop.time() - began))
        return count > processes

    async def leave(self) -> Ending:
        if self._marked:
            return Ending(clean=self._mark.kill())
        self.kill()
        return Ending()


Place = GroupPlace | MarkPlace
