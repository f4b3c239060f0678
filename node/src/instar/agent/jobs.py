"""Jobs: taken once, begun in order, their results sent until the server has acknowledged them.

Two lanes that do not wait for each other: what must survive a restart (purpose `job`) comes from the
disk, PLACES at once, begun in the order of arrival; `rehearsal` and `health`, whose repetition does no
harm, run from memory, one after the other, so that long jobs cannot hold up a verdict.

A job whose module is not on the disk has it fetched first. It keeps its turn, but no place; the time
counts for `lapse_s`, not for `deadline_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instar.agent.lanes import Entry, Lane
from instar.agent.store import MOST_HELD, DiskStore, MemoryStore, check_job_id
from instar.core.errors import InputError, InstarError, MachineError
from instar.host.clock import Clock
from instar.host.points import reach
from instar.wire.messages import Job, Message, Result, Taken

if TYPE_CHECKING:
    from instar.agent.bringing import Bringer
    from instar.agent.runners import Runners
    from instar.agent.running import Services
    from instar.agent.shelf import Shelf
    from instar.host.scratch import Scratch

PLACES = 4
PURPOSES = ("job", "rehearsal", "health")
LOOK_LEAST_S, LOOK_S = 0.05, 3600.0  # one wait for a lapse: a machine may sleep meanwhile
END_WITHIN_S = 7.0  # for runs that were killed

log = logging.getLogger("instar.agent")
Send = Callable[[Message], bool]  # False when there is no connection; a result is sent again later


class Jobs:
    """`send` hands a message to the channel. `services` gives the supervisor, if there is one; `scratch` is
    a folder for the runs' own folders; `random01` draws from [0, 1]. Made within the event loop."""

    def __init__(
        self,
        disk: DiskStore,
        runners: Runners,
        shelf: Shelf,
        services: Callable[[], Services | None],
        send: Send,
        scratch: Path,
        clock: Clock,
        random01: Callable[[], float],
    ) -> None:
        self._runners, self._shelf, self._services, self._send = runners, shelf, services, send
        self._scratch_folder, self._clock, self._random01 = scratch, clock, random01
        self._scratch: Scratch | None = None
        self._durable, self._passing = Lane(disk, PLACES), Lane(MemoryStore(), 1)
        self._open = self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._bringer: Bringer | None = None
        self._fault: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for job, received in disk.recover():
            waited_s = max(0.0, clock.wall() - received) if received else 0.0
            self._queue(self._durable, self._entry(job, waited_s))

    @property
    def held(self) -> int:
        return sum(lane.store.held() for lane in self._lanes)

    @property
    def _lanes(self) -> tuple[Lane, Lane]:
        return self._durable, self._passing

    # --- what the channel brings

    def take(self, job: Job) -> None:
        """Accept a job once, and say so. A repeat runs nothing, but its result, if there is one, is sent again.

        Raises InputError for a job that nobody could run; the server gets an `error` for it.
        """
        check_job_id(job.id)
        if job.purpose not in PURPOSES:
            known = ", ".join(PURPOSES)
            text = f"cannot take job {job.id}: expected purpose {known}, got {job.purpose!a:.40}"
            raise InputError("bad-purpose", text)
        for lane in self._lanes:
            if lane.store.known(job.id):
                self._repeat(lane, job.id)
                return
        if self.held >= MOST_HELD:
            self._refuse(job.id, f"{MOST_HELD} are held already")
            return
        lane = self._durable if job.purpose == "job" else self._passing
        entry = self._entry(job, 0.0)
        try:
            lane.store.receive(job, self._is_next(lane, entry))
        except InstarError as error:  # the disk is full: say so now, keep nothing
            log.error("job %s is not taken: %s", job.id, error)
            self._refuse(job.id, error.text)
            return
        if lane is self._durable:
            self._send(Taken(job.id))
            reach("job:taken")
        self._queue(lane, entry)
        self._begin(lane)

    def cancel(self, job_id: str) -> None:
        """Do not begin the job, or end it. One that never came is not begun when it comes. Raises InputError."""
        check_job_id(job_id)
        for lane in self._lanes:
            if job_id in lane.waiting:
                self._conclude(lane, job_id, "cancelled", "cannot run job: it was cancelled before it began")
            elif job_id in lane.running:
                _tell(lane.running[job_id].stop, "cancelled")
            elif lane.store.known(job_id):
                self._resend(lane, job_id)
            else:
                continue
            reach("job:cancelled")
            return
        if self.held < MOST_HELD:
            self._conclude(
                self._durable, job_id, "cancelled", "cannot run job: it was cancelled before it came"
            )
            reach("job:cancelled")

    def acknowledged(self, job_id: str) -> None:
        for lane in self._lanes:
            lane.store.acknowledged(job_id)

    def resend(self) -> None:
        """Send every result that the server has not acknowledged: after each welcome."""
        for lane in self._lanes:
            for job_id in lane.store.unacknowledged():
                self._resend(lane, job_id)

    # --- its life

    async def run(self) -> None:
        """Work, until cancelled. Raises what went wrong in our own code."""
        self._open = True
        try:
            for lane in self._lanes:
                self._begin(lane)
            await self._fault
        finally:
            self._open = False
            for entry in self._entries():
                entry.let_go()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=END_WITHIN_S)

    async def finish(self, within_s: float) -> None:
        """Begin nothing more, give what runs `within_s` to end, then kill it; its results say `interrupted`.

        What waits is kept for the next start, and so is what comes from now on. Idempotent.
        """
        self._stopping = True
        for entry in self._entries():
            entry.let_go()
        if await self._ended(within_s):
            return
        log.warning("%d jobs still run after %g s; they are killed", len(self._tasks), within_s)
        for lane in self._lanes:
            for entry in lane.running.values():
                _tell(entry.stop, "stopped")
        await self._ended(END_WITHIN_S)

    async def _ended(self, within_s: float) -> bool:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within_s)
        return not self._tasks

    # --- from waiting to running

    def _entry(self, job: Job, waited_s: float) -> Entry:
        lapse_at = self._clock.boottime() + job.lapse_s - waited_s if job.lapse_s > 0 else None
        return Entry(job, lapse_at)

    def _is_next(self, lane: Lane, entry: Entry) -> bool:
        """Whether it will be begun as soon as it is queued: its place is free, and its module is here."""
        free = self._open and not self._stopping and not lane.waiting and len(lane.running) < lane.places
        try:
            return free and self._find(entry)
        except InputError:
            return False

    def _queue(self, lane: Lane, entry: Entry) -> None:
        lane.waiting[entry.job.id] = entry
        self._watch(lane, entry)

    def _watch(self, lane: Lane, entry: Entry) -> None:
        """End a job that waits when its time has passed; not later than when its turn comes."""
        if entry.lapse_at is None:
            return
        left_s = entry.lapse_at - self._clock.boottime()
        if left_s <= 0 and self._open:
            text = f"cannot run job: it was not begun within {entry.job.lapse_s:g} s"
            self._conclude(lane, entry.job.id, "lapsed", text)
            return
        wait_s = min(max(left_s, LOOK_LEAST_S), LOOK_S)
        entry.timer = asyncio.get_running_loop().call_later(wait_s, self._watch, lane, entry)

    def _begin(self, lane: Lane) -> None:
        """Begin what can be begun, oldest first."""
        if self._stopping or not self._open:
            return
        for entry in list(lane.waiting.values()):
            if len(lane.running) >= lane.places:
                return
            if entry.fetch is not None or self._is_over(lane, entry):
                continue
            if self._is_ready(lane, entry):
                entry.let_go()
                lane.running[entry.job.id] = lane.waiting.pop(entry.job.id)
                self._go(self._do(lane, entry))

    def _is_over(self, lane: Lane, entry: Entry) -> bool:
        if entry.lapse_at is not None and entry.lapse_at <= self._clock.boottime():
            entry.let_go()
            self._watch(lane, entry)
        return entry.job.id not in lane.waiting

    def _is_ready(self, lane: Lane, entry: Entry) -> bool:
        """Whether its module is here. If not, it is being fetched from now on, or the job has ended."""
        try:
            if self._find(entry):
                return True
        except InputError as error:
            self._conclude(lane, entry.job.id, "bad-job", error.text)
            return False
        entry.fetch = self._go(self._fetch(lane, entry))
        return False

    def _find(self, entry: Entry) -> bool:
        """Whether what it needs is here. Raises InputError for what names no module."""
        job = entry.job
        if not job.digest or self._service(job) is not None:
            return True
        if entry.module is None:
            entry.module = self._shelf.find(job.module, job.version, job.digest)
        return entry.module is not None

    def _service(self, job: Job) -> Services | None:
        """Whom to ask, when the module is a service that is kept running here."""
        services = self._services()
        return services if services is not None and job.module in services.states() else None

    async def _fetch(self, lane: Lane, entry: Entry) -> None:
        if self._bringer is None:
            from instar.agent.bringing import Bringer

            self._bringer = Bringer(self._shelf, self._random01)
        try:
            why_not = await self._bringer.bring(entry.job)
            if why_not:
                self._conclude(lane, entry.job.id, "no-module", why_not)
        finally:
            entry.fetch = None
        self._begin(lane)

    # --- running

    async def _do(self, lane: Lane, entry: Entry) -> None:
        job = entry.job
        try:
            result = await self._result(lane, entry)
        except asyncio.CancelledError:
            from instar.agent.running import STOPPED, failure

            self._keep(lane, failure(job.id, "interrupted", STOPPED))
            raise
        finally:
            del lane.running[job.id]
        if lane is self._durable:
            reach("job:ran")
        self._keep(lane, result)
        log.info("job %s (%s): %s", job.id, job.module, "ok" if result.ok else result.reason)
        self._begin(lane)

    async def _result(self, lane: Lane, entry: Entry) -> Result:
        from instar.agent.output import JobOutput
        from instar.agent.running import ask_job, failure, run_job

        job, services, output = entry.job, self._service(entry.job), JobOutput(entry.job.id, self._send)

        def before() -> None:
            lane.store.start(job.id)

        try:
            if services is not None:
                return await ask_job(job, services, output.heed, before, entry.stop)
            if entry.module is not None and entry.module.manifest.mode != "oneshot":
                text = f"cannot ask {job.module}: it is a service, and none of that name is kept running here"
                return failure(job.id, "no-module", text)
            if entry.module is not None:
                self._shelf.mark_used(entry.module)
            async with self._folder(entry) as cwd:
                return await run_job(job, self._runners, cwd, entry.module, output.heed, before, entry.stop)
        except InstarError as error:  # the disk: it was not begun
            log.error("job %s: %s", job.id, error)
            return failure(job.id, error.code, f"cannot run job: {error.text}")
        except OSError as error:
            return failure(job.id, "no-runner", f"cannot make a folder for the job: {error.strerror}")
        finally:
            output.end()

    @contextlib.asynccontextmanager
    async def _folder(self, entry: Entry) -> AsyncIterator[Path]:
        """The run's working folder: of its own, but for what rides in the program and writes nothing."""
        if entry.module is None:
            yield Path("/")
            return
        if self._scratch is None:
            from instar.host.scratch import Scratch

            self._scratch = Scratch(self._scratch_folder)
        path = await self._scratch.make()
        try:
            yield path
        finally:
            await self._scratch.drop(path)

    # --- ending

    def _conclude(self, lane: Lane, job_id: str, code: str, reason: str) -> None:
        """End a job that was not begun."""
        entry = lane.waiting.pop(job_id, None)
        if entry is not None:
            entry.let_go()
        log.info("job %s: %s", job_id, reason)
        self._keep(lane, Result(job_id, ok=False, code=code, reason=reason[:1000]))

    def _keep(self, lane: Lane, result: Result) -> None:
        """Store the result, then send it. One that the disk does not take is sent all the same."""
        try:
            lane.store.finish(result)
        except MachineError as error:
            log.error("the result of job %s is not on the disk: %s", result.id, error)
        self._send(result)
        if lane is self._durable:
            reach("job:sent")

    def _repeat(self, lane: Lane, job_id: str) -> None:
        if not self._resend(lane, job_id) and lane is self._durable:
            self._send(Taken(job_id))

    def _resend(self, lane: Lane, job_id: str) -> bool:
        result = lane.store.result(job_id)
        if result is not None:
            self._send(result)
        return result is not None

    def _refuse(self, job_id: str, why: str) -> None:
        self._send(Result(job_id, ok=False, reason=f"cannot take job: {why}", code="not-taken"))

    # --- tasks

    def _entries(self) -> Iterator[Entry]:
        for lane in self._lanes:
            yield from lane.waiting.values()

    def _go(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._gone)
        return task

    def _gone(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not self._fault.done():
            self._fault.set_exception(error)  # a fault of ours must not look like a job that never ends


def _tell(stop: asyncio.Future[str], why: str) -> None:
    if not stop.done():
        stop.set_result(why)
