"""One service module's process, kept running: started, watched, asked, stopped.

What follows what is `core.lifecycle`'s table; this drives it. A process ends in one of three ways: it was
told to stop, it fell, or a bound passed and it was killed. Whatever its code says on the control line may
be nonsense: that is ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from instar.agent.asking import Heed, Questions, error_of
from instar.agent.strays import end_stray
from instar.core.backoff import Backoff
from instar.core.errors import InstarError
from instar.core.lifecycle import BACKOFF, PROVE_S, SHOWN, STEADY_S, STOPPING, Event, State, after
from instar.host import processes
from instar.host.clock import Clock
from instar.host.files import make_folder
from instar.host.layout import ModuleLayout
from instar.host.points import reach

if TYPE_CHECKING:
    from instar.agent.shelf import Module
    from instar.agent.spawn import Outcome, Run

LOOK_S = 3600.0  # one wait for a process's end; then the next
REAP_WITHIN_S = 5.0  # for a process to be gone once it is killed
LINES_A_MINUTE = 60  # of a module's own words in our log
SAYS = {"ready": Event.READY, "ok": Event.WELL, "failed": Event.UNWELL}

log = logging.getLogger("instar.agent")
Gate = Callable[["Service"], Awaitable[None]]  # returns when the service may start


class Starter(Protocol):
    """What of `Runners` a service needs."""

    async def start(
        self, request: dict[str, Any], heed: Heed, cwd: Path, warm: bool = True
    ) -> Run: ...  # raises OSError, InstarError


class Service:
    """`used` is told at each start, `changed` after each change of state."""

    def __init__(
        self,
        module: Module,
        place: ModuleLayout,
        runners: Starter,
        clock: Clock,
        random01: Callable[[], float],
        used: Callable[[Module], None],
        changed: Callable[[], None],
    ) -> None:
        self.module, self.state = module, State.ABSENT
        self.restarts = 0  # starts after a failure
        self.error = ""  # why it is not well, or last was not
        self._place, self._runners, self._clock = place, runners, clock
        self._random01, self._used, self._changed = random01, used, changed
        self._backoff = Backoff(*BACKOFF)
        self._falls = 0  # in a row
        self._blocked = False
        self._since, self._ready_at = clock.wall(), 0.0
        self._last: Outcome | None = None
        self._run: Run | None = None
        self._questions: Questions | None = None
        self._task: asyncio.Task[None] | None = None
        self._living = False  # a process runs or is being made
        self._timer: asyncio.TimerHandle | None = None
        self._said, self._words = "", _Words(module.manifest.name)

    @property
    def name(self) -> str:
        return self.module.manifest.name

    @property
    def depends(self) -> tuple[str, ...]:
        return self.module.manifest.depends

    @property
    def pid(self) -> int:
        """0 when there is no process."""
        return self._run.pid if self._run else 0

    @property
    def task(self) -> asyncio.Task[None] | None:
        return self._task

    def may_recover(self, falls: int) -> bool:
        """It has failed, but not more than so often in a row: waiting for it makes sense."""
        failed = self.state in (State.FAILED, State.RETRYING, State.PROVING)
        return failed and not self._blocked and self._falls <= falls

    def describe(self) -> dict[str, Any]:
        """For people; all texts are short and in ASCII."""
        last = self._last
        return {
            "name": self.name,
            "version": self.module.manifest.version,
            "digest": self.module.digest,
            "state": SHOWN[self.state],
            "life": self.state.value,
            "pid": self.pid,
            "since": round(self._since, 3),
            "restarts": self.restarts,
            "error": self.error,
            "exit_code": last.exit_code if last else 0,
            "signal": last.signal if last else 0,
            "max_rss": last.max_rss if last else 0,
            "stderr": ascii(last.stderr[-200:])[1:-1] if last else "",
        }

    # --- what the supervisor wants of it

    def start(self, gate: Gate) -> None:
        """Keep it running from now on, once `gate` lets it. Idempotent."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._keep(gate), name=f"module {self.name}")
            self._task.add_done_callback(lambda _: self._changed())

    def block(self, why: str) -> None:
        """It cannot be started now: what it depends on is not there."""
        if why != self.error or self.state is not State.FAILED:
            log.error("module %s cannot start: %s", self.name, why)
            self.error, self._blocked = why, True
            self._happen(Event.BLOCKED)

    async def stop(self, within_s: float) -> str:
        """Tell it to stop, wait for up to its `stop_s` and `within_s`, then kill it. Idempotent.

        Returns 'stopped' or 'killed'. Cut off itself, it can be called again.
        """
        task = self._task
        asked = self._happen(Event.STOP)
        if task is not None and not self._living:  # it only waits for its turn
            task.cancel()
            await asyncio.wait([task], timeout=REAP_WITHIN_S)
        elif task is not None and not task.done():
            if asked and self._run is not None:
                self._run.say({"do": "stop"})
            await self._ended_or_killed(task, min(self.module.manifest.timeouts.stop_s, within_s))
        return "killed" if self.state is State.KILLED else "stopped"

    def retire(self) -> None:
        """It is not wanted any more. Only when it has been stopped."""
        self._happen(Event.RETIRED)

    def end_now(self) -> None:
        """The agent ends: kill what still runs, without a wait."""
        if self._run is not None:
            self._run.kill("agent-ended")
        if self._task is not None:
            self._task.cancel()

    async def ask(self, args: dict[str, Any], deadline_s: float, heed: Heed) -> dict[str, Any]:
        """Ask the running process. Raises InstarError; the caller has seen that it can be asked."""
        if self._questions is None:
            raise InstarError("no-module", f"cannot ask {self.name}: it does not run")
        return await self._questions.ask(args, deadline_s, heed)

    # --- one life after the other

    async def _keep(self, gate: Gate) -> None:
        while True:
            await gate(self)
            self._living = True
            try:
                await self._live()
            finally:
                self._living = False
            if self.state is not State.FAILED:
                return
            self.restarts += 1
            self._falls += 1
            self._changed()
            wait_s = self._backoff.next(self._random01())
            log.info("module %s: next try in %.1f s", self.name, wait_s)
            await asyncio.sleep(wait_s)

    async def _live(self) -> None:
        if self.state is not State.FAILED:  # somebody wants it started, anew
            self._forgive()
        self._blocked = False
        self._happen(Event.START)
        self._arm(self.module.manifest.timeouts.ready_s, self._late)
        try:
            run = await self._begin()
        except (InstarError, OSError) as error:
            self._fell(f"cannot start: {error}")
            return
        self._run = run
        self._questions = Questions(self.name, run.say)
        if self.state in STOPPING:
            run.say({"do": "stop"})
        elif self.state not in (State.STARTING, State.RETRYING):  # too late while it was being made
            run.kill("late")
        try:
            reach("service:spawned")
            self._record(run.pid)
            reach("service:recorded")
            while not await run.ended(LOOK_S):
                pass
            outcome = await run.outcome()
        finally:
            self._forget()
        self._over(outcome)

    async def _begin(self) -> Run:
        stop_s = self.module.manifest.timeouts.stop_s
        await end_stray(self._place.process, self._clock.boot_id(), stop_s)
        make_folder(self._place.data, 0o700)
        self._used(self.module)
        self._said = ""
        return await self._runners.start(
            serve_request(self.module, self._place), self._heed, self._place.data, False
        )

    def _record(self, pid: int) -> None:
        mine = processes.Process(
            pid, processes.start_time(pid) or 0, self._clock.boot_id(), self.module.release
        )
        try:
            processes.record(self._place.process, mine)
        except InstarError as error:  # a full disk: it runs all the same
            log.error("module %s: %s", self.name, error)

    def _forget(self) -> None:
        if self._questions is not None:
            self._questions.end("interrupted", "it ended before it had answered")
        self._run = self._questions = None
        with contextlib.suppress(OSError):
            os.unlink(self._place.process)

    def _over(self, outcome: Outcome) -> None:
        """The process has ended, one way or another."""
        self._last = outcome
        words = tell(outcome, self._said)
        if self.state in STOPPING or self.state is State.KILLED:
            level = logging.INFO if outcome.exit_code == outcome.signal == 0 else logging.WARNING
            log.log(level, "module %s has stopped: %s", self.name, words)
            self._happen(Event.ENDED)
        elif self.state is State.FAILED:  # it was late: said already
            log.warning("module %s: %s", self.name, words)
        else:
            if self._ready_at and self._clock.monotonic() - self._ready_at >= STEADY_S:
                self._forgive()
            self._fell(words)

    def _forgive(self) -> None:
        """The next failure counts as the first."""
        self._backoff.reset()
        self._falls = 0

    def _fell(self, why: str) -> None:
        if self.state not in STOPPING:
            self.error = why[:500]
            log.warning("module %s failed: %s", self.name, why)
        self._happen(Event.ENDED)

    async def _ended_or_killed(self, task: asyncio.Task[None], within_s: float) -> None:
        await asyncio.wait([task], timeout=max(within_s, 0.0))
        if task.done():
            return
        log.warning("module %s was not stopped within %.1f s: it is killed", self.name, within_s)
        self._happen(Event.LATE)
        if self._run is not None:
            self._run.kill("stop")
        await asyncio.wait([task], timeout=REAP_WITHIN_S)
        if not task.done():
            log.error("module %s does not end, though it was killed", self.name)
            task.cancel()

    # --- events

    def _happen(self, event: Event) -> bool:
        """Whether it changes anything."""
        then = after(self.state, event)
        if then is self.state:
            return False
        self._arm(0.0, None)
        log.info("module %s: %s -> %s", self.name, self.state.value, then.value)
        self.state, self._since = then, self._clock.wall()
        if event is Event.READY:
            self._ready_at = self._clock.monotonic()
        elif event is Event.START:
            self._ready_at = 0.0
        if then is State.READY:
            self.error = ""
        elif then is State.PROVING:
            self._arm(PROVE_S, self._steady)
        self._changed()
        return True

    def _arm(self, seconds: float, do: Callable[[], object] | None) -> None:
        """Let `do` happen later, in the place of what was to happen before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, do) if do else None

    def _steady(self) -> None:
        if self._run is not None and not self._run.over:
            self._happen(Event.STEADY)

    def _late(self) -> None:
        """It has not said that it is ready."""
        seconds = self.module.manifest.timeouts.ready_s
        self.error = f"it did not say that it is ready within {seconds:g} s, and was killed"
        log.warning("module %s failed: %s", self.name, self.error)
        self._happen(Event.LATE)
        if self._run is not None:
            self._run.kill("late")

    # --- what it says

    def _heed(self, said: dict[str, Any]) -> None:
        if self._questions is not None and self._questions.heed(said):
            return
        state, stopping = said.get("state"), said.get("stopping")
        if isinstance(state, str) and state in SAYS:
            if state == "failed":
                self.error = ascii(said.get("text", ""))[1:-1][:500]
            self._happen(SAYS[state])
        elif stopping == "ready":
            self._happen(Event.SAVED)
        elif stopping == "busy":
            log.info("module %s is busy: %s", self.name, ascii(said.get("text", ""))[1:-1][:200])
        elif said.get("ok") is False:
            self._said = error_of(said, "module-failed").text
        elif isinstance(said.get("log"), str):
            self._words.say(said["log"], self._clock.monotonic())


class _Words:
    """A module's own lines in our log: at most LINES_A_MINUTE."""

    def __init__(self, name: str) -> None:
        self._name, self._began, self._said = name, 0.0, 0

    def say(self, words: str, now: float) -> None:
        if now - self._began >= 60.0:
            if self._said > LINES_A_MINUTE:
                log.info("module %s: %d lines are left out", self._name, self._said - LINES_A_MINUTE)
            self._began, self._said = now, 0
        self._said += 1
        if self._said <= LINES_A_MINUTE:
            log.info("module %s says: %s", self._name, ascii(words[:500])[1:-1])


def serve_request(module: Module, place: ModuleLayout) -> dict[str, Any]:
    """The first line on the control line of a service module's process."""
    return {"v": 1, "do": "serve", "args": {}, "data": str(place.data), **module.request(0)}


def tell(outcome: Outcome, said: str) -> str:
    """One line: how a process ended, and its last words. An end that nobody asked for is a failure, exit 0 too."""
    if outcome.cut:
        how = f"it was killed ({outcome.cut})"
    elif outcome.signal:
        how = f"it was ended by {processes.signal_name(outcome.signal)}"
    else:
        how = f"it ended with exit status {outcome.exit_code}"
    lines = [line.strip() for line in outcome.stderr.splitlines() if line.strip()]
    last = said or (lines[-1] if lines else "")
    took = f" after {outcome.seconds:.1f} s, {outcome.max_rss >> 20} MiB at most"
    return how + took + (f": {ascii(last[:300])[1:-1]}" if last else "")
