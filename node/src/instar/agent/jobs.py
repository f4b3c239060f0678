"""Jobs: taken once, run in order, their results sent until the server has acknowledged them.

Two lanes that do not wait for each other: what must survive a restart (purpose `job`) runs in order
of arrival from the disk; `rehearsal` and `health`, whose repetition does no harm, run from memory, so
that a long job cannot hold up a verdict.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instar.agent.spawn import Outcome, run_child
from instar.agent.store import MOST_HELD, DiskStore, MemoryStore, Store, check_job_id
from instar.core.errors import InputError, InstarError
from instar.wire.codec import encode
from instar.wire.messages import MAX_FRAME, Job, Result

LEAST_DEADLINE_S, MOST_DEADLINE_S = 0.1, 86_400.0
PURPOSES = ("job", "rehearsal", "health")
STOPPED = "cannot finish job: the agent was stopped while it ran; it is not run again"

log = logging.getLogger("instar.agent")
Send = Callable[[Result], bool]  # False when there is no connection; the result is sent again later


class Lane:
    """One store and the task that works it off."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.waiting: deque[Job] = deque()
        self.arrived = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()


class Jobs:
    """`command` starts a runner. `send` hands a result to the channel."""

    def __init__(self, disk: DiskStore, command: list[str], send: Send, cwd: Path = Path("/")) -> None:
        self._command, self._send, self._cwd = command, send, cwd
        self._durable, self._passing = Lane(disk), Lane(MemoryStore())
        self._stopping = False
        for job in disk.recover():
            self._queue(self._durable, job)

    @property
    def held(self) -> int:
        return sum(lane.store.held() for lane in self._lanes)

    @property
    def _lanes(self) -> tuple[Lane, Lane]:
        return self._durable, self._passing

    def take(self, job: Job) -> None:
        """Accept a job once. A repeat runs nothing, but its result, if there is one, is sent again.

        Raises InputError for a job that nobody could run; the server gets an `error` for it.
        """
        check_job_id(job.id)
        if job.purpose not in PURPOSES:
            known = ", ".join(PURPOSES)
            text = f"cannot take job {job.id}: expected purpose {known}, got {job.purpose!a:.40}"
            raise InputError("bad-purpose", text)
        for lane in self._lanes:
            if lane.store.known(job.id):
                self._resend(lane, job.id)
                return
        if self.held >= MOST_HELD:
            self._send(Result(job.id, ok=False, reason=f"cannot take job: {MOST_HELD} are held already"))
            return
        lane = self._durable if job.purpose == "job" else self._passing
        try:
            lane.store.receive(job)
        except InstarError as error:  # the disk is full: say so now, keep nothing
            log.error("job %s is not taken: %s", job.id, error)
            self._send(Result(job.id, ok=False, reason=f"cannot take job: {error.text}"))
            return
        self._queue(lane, job)

    def acknowledged(self, job_id: str) -> None:
        for lane in self._lanes:
            lane.store.acknowledged(job_id)

    def resend(self) -> None:
        """Send every result that the server has not acknowledged: after each welcome."""
        for lane in self._lanes:
            for job_id in lane.store.unacknowledged():
                self._resend(lane, job_id)

    async def run(self) -> None:
        """Work, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for lane in self._lanes:
                group.create_task(self._work(lane))

    async def finish(self, within_s: float) -> None:
        """Start nothing more, and give what runs `within_s` to end. What waits is kept for the next start."""
        self._stopping = True
        try:
            async with asyncio.timeout(within_s):
                for lane in self._lanes:
                    await lane.idle.wait()
        except TimeoutError:
            log.warning("a job still runs after %g s; it is killed", within_s)

    def _queue(self, lane: Lane, job: Job) -> None:
        lane.waiting.append(job)
        lane.arrived.set()

    async def _work(self, lane: Lane) -> None:
        while True:
            await lane.arrived.wait()
            lane.arrived.clear()
            while lane.waiting and not self._stopping:
                lane.idle.clear()
                try:
                    await self._do(lane, lane.waiting.popleft())
                finally:
                    lane.idle.set()

    async def _do(self, lane: Lane, job: Job) -> None:
        try:
            lane.store.start(job.id)
            try:
                result = await run_job(job, self._command, self._cwd)
            except asyncio.CancelledError:
                with contextlib.suppress(InstarError):  # the next start ends it as interrupted
                    lane.store.finish(Result(job.id, ok=False, reason=STOPPED))
                raise
            try:
                lane.store.finish(result)
            except InputError as error:  # too large for a frame after all
                lane.store.finish(Result(job.id, ok=False, exit_code=result.exit_code, reason=error.text))
        except InstarError as error:
            log.error("job %s: %s", job.id, error)
            self._send(Result(job.id, ok=False, reason=f"cannot run job: {error}"))
            return
        log.info("job %s (%s): %s", job.id, job.module, "ok" if result.ok else result.reason)
        self._resend(lane, job.id)

    def _resend(self, lane: Lane, job_id: str) -> None:
        result = lane.store.result(job_id)
        if result is not None:
            self._send(result)


async def run_job(job: Job, command: list[str], cwd: Path = Path("/")) -> Result:
    """Run one job in a runner process and say what came of it. Never raises for what the runner does."""
    deadline_s = min(max(job.deadline_s, LEAST_DEADLINE_S), MOST_DEADLINE_S)
    request = {"v": 1, "module": job.module, "args": job.args, "limits": {"seconds": deadline_s}}
    try:
        outcome = await run_child(command, json.dumps(request).encode(), deadline_s, MAX_FRAME, cwd)
    except OSError as error:
        return Result(job.id, ok=False, reason=f"cannot start a runner: {error.strerror or error}")
    reply, reason = _judge(outcome, deadline_s)
    result = Result(
        id=job.id,
        ok=not reason,
        reply=reply,
        exit_code=outcome.exit_code,
        signal=outcome.signal,
        seconds=outcome.seconds,
        max_rss=outcome.max_rss,
        stderr=outcome.stderr,
        reason=reason,
    )
    try:
        encode(result)
    except InputError as error:
        seconds = outcome.seconds
        return Result(job.id, ok=False, exit_code=outcome.exit_code, seconds=seconds, reason=error.text)
    return result


def _judge(outcome: Outcome, deadline_s: float) -> tuple[dict[str, Any], str]:
    """(reply, why the job failed). Good is only: exit 0 with a whole, readable reply."""
    if outcome.cut == "deadline":
        return {}, f"cannot run job: expected an end within {deadline_s:g} s, got none; it was killed"
    if outcome.cut:
        return {}, f"cannot run job: expected at most {MAX_FRAME} bytes of reply, got more; it was killed"
    if outcome.signal:
        return {}, f"cannot run job: the runner was ended by {_signal_name(outcome.signal)}"
    try:
        answer = json.loads(outcome.output)
        good, error = answer.get("ok"), answer.get("error", {})
        if outcome.exit_code == 0 and good is True and isinstance(answer["reply"], dict):
            return answer["reply"], ""
        if good is False:
            return {}, f"{error['text']!s:.500} ({error['code']!s:.64})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # said below, with what the exit code was
    got = "no reply" if not outcome.output else "no readable reply"
    return {}, f"cannot run job: expected exit 0 and a reply, got exit {outcome.exit_code} and {got}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
