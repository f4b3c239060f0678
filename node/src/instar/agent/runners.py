"""Runner processes: warm or cold, each in a place of its own, none left behind.

A warm one is forked by the fork server (warm.py), which is started at the first warm run and ended
IDLE_S after the last. For SPARE_S after each run a few spare children are kept: forked already and in their
places, so that the next jobs wait for neither. Where the fork server cannot be had, runs start cold.
Services always do: the end of a fork server would end what it has forked.

Nothing is started, and little imported, before the first run.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instar.agent.places import Place
    from instar.agent.spawn import Child, Ends, Run
    from instar.agent.warm import ForkServer, WarmChild
    from instar.host.cgroups import Groups

IDLE_S = 60.0  # without a run; then the fork server ends
SPARES = 3  # going into a cgroup takes a spare some 10 ms; so many jobs in that time wait for nothing
SPARE_S = 20.0  # none is used that is older: a runner leaves after 30 s without its first line
REFILL_AFTER_S = 0.005  # for the result of the run before to be on its way
FORK_WITHIN_S = 10.0  # for an answer of the fork server, its own start included
COLD_FOR_S = 30.0  # after a fork server that failed, before the next one is started
CLOSE_WITHIN_S = 5.0
LATE_EVERY_S = 1.0  # how often one that did not die in time is looked for

log = logging.getLogger("instar.agent")
Heed = Callable[[dict[str, Any]], None]


class Runners:
    """`command` starts a cold runner. `grouped`: use cgroups where there are some that are ours."""

    def __init__(
        self,
        command: list[str],
        grouped: bool = True,
        idle_s: float = IDLE_S,
        fork_within_s: float = FORK_WITHIN_S,
    ) -> None:
        self._command, self._grouped = command, grouped
        self._idle_s, self._fork_within_s = idle_s, fork_within_s
        self._groups: Groups | None = None
        self._looked_for_groups = False
        self._number = 0
        self._server: ForkServer | None = None
        self._cold_until = 0.0
        self._spares: list[Run] = []
        self._refilling = 0
        self._spare_end: asyncio.TimerHandle | None = None
        self._runs: set[Run] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def warm_pid(self) -> int:
        """The fork server's; 0 when there is none."""
        return self._server.pid if self._server is not None and self._server.alive else 0

    async def start(
        self,
        request: dict[str, Any],
        heed: Heed,
        cwd: Path,
        warm: bool = True,
        before: Callable[[], None] | None = None,
    ) -> Run:
        """Start a runner, put it into its place, call `before`, and give it its first line, `request`.

        `heed` is called in the event loop with each line that the runner says. Raises OSError when no
        runner can be started, and whatever `before` raises; then nothing is left of it.
        """
        began = time.monotonic()
        run = self._take_spare() if warm else None
        if run is None:
            run = await self._new(request, cwd, warm)
        try:
            if before is not None:
                before()
            run.begin({**request, "cwd": str(cwd)}, heed, began)
        except BaseException:
            run.kill("not begun")
            await run.outcome()
            raise
        return run

    async def close(self) -> None:
        """End the fork server and what it forked. Cold runs that go on are their owners' business. Idempotent."""
        self._closed = True
        if self._idle is not None:
            self._idle.cancel()
        if self._spare_end is not None:
            self._spare_end.cancel()
        await self._end_server()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_WITHIN_S)
        if self._groups is not None and not self._runs:
            self._groups.close()

    # --- starting

    async def _new(self, request: dict[str, Any], cwd: Path, warm: bool) -> Run:
        from instar.agent.spawn import Ends, Run, start_cold

        module = request.get("module", {})
        name = f"module-{module.get('name')}" if request.get("do") == "serve" else ""
        place = self._place(name)
        ends, entrance = Ends(), place.entrance() if warm else -1
        try:
            child: Child | None = await self._fork(ends, entrance) if warm else None
            inside = child is not None and entrance >= 0
            if child is None:
                child = start_cold(self._command, ends, cwd, str(module.get("name", "")))
        except BaseException:
            ends.close()
            await place.leave()
            raise
        finally:
            if entrance >= 0:
                os.close(entrance)
        ends.given()
        run = Run(child, ends, place if inside else self._put(place, child.pid), self._over)
        self._runs.add(run)
        return run

    def _put(self, place: Place, pid: int) -> Place:
        """The place that `pid` is in. Nothing of a module runs yet."""
        from instar.agent.places import MarkPlace
        from instar.host.marks import Mark

        try:
            place.put(pid)
        except OSError as error:
            log.warning("runner %d has no cgroup: %s", pid, error.strerror)
            self._later(_leave(place))
            place = MarkPlace(Mark.unique(self._number))
            place.put(pid)
        return place

    async def _fork(self, ends: Ends, entrance: int) -> WarmChild | None:
        """A warm child, or None: then the run starts cold."""
        if time.monotonic() < self._cold_until or self._closed:
            return None
        try:
            if self._server is None or not self._server.alive:
                await self._new_server()
            assert self._server is not None
            return await _forked(self._server.fork(ends, entrance), self._fork_within_s)
        except OSError as error:  # TimeoutError is one
            if isinstance(error, BlockingIOError) and self.warm_pid:  # it lives, and cannot fork just now
                log.warning("starting a runner cold: %s", error)
                return None
            log.warning("starting runners cold for %g s: %s", COLD_FOR_S, str(error) or "no answer")
            self._cold_until = time.monotonic() + COLD_FOR_S
            self._later(self._end_server())
            return None

    async def _new_server(self) -> None:
        from instar.agent.warm import ForkServer

        old, self._server = self._server, ForkServer(self._command)
        self._rest_later()
        if old is not None:
            await old.close()

    def _place(self, name: str) -> Place:
        """A leaf where there are cgroups of ours, else a mark."""
        from instar.agent.places import GroupPlace, MarkPlace
        from instar.host.marks import Mark

        self._number += 1
        groups = self._find_groups()
        if groups is not None:
            try:
                return GroupPlace(groups.make(name or f"job-{self._number}"))
            except OSError as error:
                log.warning("no cgroup for a runner: %s", error.strerror)
        return MarkPlace(Mark.unique(self._number))

    def _find_groups(self) -> Groups | None:
        if self._grouped and not self._looked_for_groups:
            from instar.host import cgroups

            self._looked_for_groups = True
            groups = cgroups.find()
            try:
                if groups is not None:
                    groups.open()
                    self._groups = groups
            except OSError as error:
                log.warning("no cgroups for runners: %s", error.strerror)
        return self._groups

    # --- the spares, and the fork server's end

    def _take_spare(self) -> Run | None:
        while self._spares:
            run = self._spares.pop(0)
            if not run.over and self._age_s(run) < SPARE_S:
                return run
            self._later(_end(run))
        return None

    def _age_s(self, run: Run) -> float:
        return time.monotonic() - run.made

    def _drop_old(self) -> None:
        """End the spares whose time is over, and come back for the next one."""
        while self._spares and self._age_s(self._spares[0]) >= SPARE_S:
            self._later(_end(self._spares.pop(0)))
        self._spare_end = None
        self._drop_later()

    def _drop_later(self) -> None:
        if self._spares and self._spare_end is None and not self._closed:
            left_s = max(0.01, SPARE_S - self._age_s(self._spares[0]))
            self._spare_end = asyncio.get_running_loop().call_later(left_s, self._drop_old)

    async def _refill(self) -> None:
        """Spares for the next runs. Not before the result of the one before is on its way."""
        await asyncio.sleep(REFILL_AFTER_S)
        while len(self._spares) + self._refilling < SPARES and not self._closed and self.warm_pid:
            self._refilling += 1
            try:
                run = await self._new({}, Path("/"), warm=True)
            except OSError:
                return
            finally:
                self._refilling -= 1
            if not run.warm or self._closed:
                await _end(run)
                return
            self._spares.append(run)  # the oldest stays first
            self._drop_later()

    def _over(self, run: Run, gone: bool) -> None:
        self._runs.discard(run)
        if not gone:
            log.error("runner %d is still there after SIGKILL", run.pid)
            self._later(self._wait_for(run))
        elif run.warm and run.used and not self._closed:
            self._later(self._refill())
        self._rest_later()

    def _rest_later(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        if self._server is not None and not self._closed:
            loop = asyncio.get_running_loop()
            self._idle = loop.call_later(self._idle_s, self._rest)

    def _rest(self) -> None:
        """The fork server is ended when only spares are left of what it forked."""
        if any(run.warm for run in self._runs if run not in self._spares):
            self._rest_later()
        else:
            self._later(self._end_server())

    async def _end_server(self) -> None:
        spares, self._spares = self._spares, []
        server, self._server = self._server, None
        for run in spares:
            await _end(run)
        if server is not None:
            await server.close()

    async def _wait_for(self, run: Run) -> None:
        while not await run.end_late():
            await asyncio.sleep(LATE_EVERY_S)

    def _later(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _forked(child: WarmChild, within_s: float) -> WarmChild:
    """`child`, when it has its pid. Raises OSError."""
    try:
        async with asyncio.timeout(within_s):
            await child.forked
    except BaseException:
        child.abandon()
        raise
    return child


async def _leave(place: Place) -> None:
    await place.leave()


async def _end(run: Run) -> None:
    run.kill("spare")
    await run.outcome()
