"""One run of a job: in a runner process, or as a question to a service module. What came of it is a Result.

Codes of a result that is not ok: `deadline`, `cancelled`, `interrupted`, `output`, `processes`, `memory`,
`signal`, `failed`, `bad-job`, `no-runner`, and what the runner or the module said.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from instar.core.errors import InputError, InstarError
from instar.host.processes import signal_name
from instar.wire.codec import decode, encode
from instar.wire.messages import MAX_FRAME, Job, Result

if TYPE_CHECKING:
    from instar.agent.runners import Runners
    from instar.agent.shelf import Module
    from instar.agent.spawn import Outcome

LEAST_DEADLINE_S, MOST_DEADLINE_S = 0.1, 86_400.0
MOST_REQUEST = MAX_FRAME - 8_192  # bytes of arguments; the rest of the runner's first line needs room
STOPPED = "cannot finish job: the agent was stopped while it ran; it is not run again"
BUILT_IN = {
    "memory": 256 << 20,
    "processes": 32,
    "files": 256,
    "cpu_s": 0,
    "disk": 64 << 20,
    "output": 1 << 20,
}
CUT = {
    "cancelled": "cannot finish job: it was cancelled and killed",
    "stopped": STOPPED,
    "interrupted": "cannot finish job: the fork server ended while it ran; it is not run again",
    "output": "cannot run job: expected at most {output} bytes of output, got more; it was killed",
    "processes": "cannot run job: expected at most {processes} processes, got more; it was killed",
    "memory": "cannot run job: expected at most {memory} bytes of memory, got more; it was killed",
    "deadline": "cannot run job: expected an end within {seconds:g} s, got none; it was killed",
}
ASKED_CUT = {
    "cancelled": "cannot finish job: it was cancelled; the module that was asked goes on",
    "stopped": "cannot finish job: the agent was stopped before the module had answered; it is not asked again",
    "deadline": "cannot finish job: expected an answer within {seconds:g} s, got none",
}
CODE_OF_CUT = {"stopped": "interrupted"}  # where the code is another word

Heed = Callable[[dict[str, Any]], None]


class Services(Protocol):
    """What of the Supervisor jobs need."""

    def states(self) -> dict[str, str]: ...
    async def request(
        self, name: str, args: dict[str, Any], deadline_s: float, heed: Heed
    ) -> dict[str, Any]: ...


class Answer:
    """Keeps the runner's last word, and passes the rest on."""

    def __init__(self, heed: Heed | None) -> None:
        self._heed = heed
        self.last: dict[str, Any] | None = None

    def heed(self, message: dict[str, Any]) -> None:
        if "ok" in message:
            self.last = message
        elif self._heed is not None:
            self._heed(message)


def deadline_of(job: Job, module: Module | None) -> float:
    """Seconds. The module's author has a word, too: `run_s` of its manifest."""
    most_s = module.manifest.timeouts.run_s if module is not None else MOST_DEADLINE_S
    return max(min(job.deadline_s, most_s, MOST_DEADLINE_S), LEAST_DEADLINE_S)


async def run_job(
    job: Job,
    runners: Runners,
    cwd: Path = Path("/"),
    module: Module | None = None,
    heed: Heed | None = None,
    before: Callable[[], None] | None = None,
    stop: asyncio.Future[str] | None = None,
    warm: bool = True,
) -> Result:
    """Run `module`, or without one the built-in that the job names, in a runner.

    `before` is called right before the module may run; what it raises is raised, and nothing runs. `stop`
    ends the run when it is done; its result is the reason. Never raises for what the runner does.
    """
    deadline_s = deadline_of(job, module)
    try:
        request = run_request(job, module, deadline_s)
    except InputError as error:
        return failure(job.id, error.code, error.text)
    answer = Answer(heed)
    try:
        run = await runners.start(request, answer.heed, cwd, warm, before)
    except OSError as error:
        text = f"cannot start a runner: {error.strerror or error}"
        return failure(job.id, "no-runner", text)
    kill = _killer(run.kill)
    if stop is not None:
        stop.add_done_callback(kill)
    try:
        if not await run.ended(deadline_s):
            run.kill("deadline")
        outcome = await run.outcome()
    except asyncio.CancelledError:
        run.kill("stopped")
        await run.outcome()
        raise
    finally:
        if stop is not None:
            stop.remove_done_callback(kill)
    return checked(_result(job, outcome, answer.last, request["limits"]))


async def ask_job(
    job: Job, services: Services, heed: Heed, before: Callable[[], None], stop: asyncio.Future[str]
) -> Result:
    """Put the job to the service module of that name. Raises only what `before` raises."""
    deadline_s, began = deadline_of(job, None), time.monotonic()
    before()
    asking = asyncio.ensure_future(services.request(job.module, job.args, deadline_s, heed))
    try:
        await asyncio.wait((asking, stop), timeout=deadline_s + 1, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            cut = stop.result() if stop.done() else "deadline"
            text = ASKED_CUT[cut].format(seconds=deadline_s)
            return failure(job.id, CODE_OF_CUT.get(cut, cut), text, time.monotonic() - began)
        reply, seconds = await asking, round(time.monotonic() - began, 4)
        return checked(Result(job.id, ok=True, reply=reply, seconds=seconds))
    except InstarError as error:
        return failure(job.id, error.code, error.text, time.monotonic() - began)
    finally:
        await _let_go(asking)


def run_request(job: Job, module: Module | None, deadline_s: float) -> dict[str, Any]:
    """The runner's first line. Raises InputError `wrong-machine`, `bad-job`."""
    request = {"v": 1, "do": "run", "args": job.args, "data": "", "user": ""}
    size = len(json.dumps(job.args))
    if size > MOST_REQUEST:
        raise InputError(
            "bad-job", f"cannot run job: expected at most {MOST_REQUEST} bytes of args, got {size}"
        )
    if module is None:
        limits = {"seconds": deadline_s, **BUILT_IN}
        return {**request, "module": {"name": job.module, "builtin": True}, "limits": limits}
    return {**request, **module.request(deadline_s)}


def failure(job_id: str, code: str, reason: str, seconds: float = 0.0) -> Result:
    return Result(job_id, ok=False, reason=reason, code=code, seconds=round(seconds, 4))


def checked(result: Result) -> Result:
    """`result`, if a frame can hold it and a peer can read it; else what is wrong with it.

    A module may have said anything. A result that no server takes would be sent again for ever.
    """
    try:
        frame = encode(result)
        if result.reply or result.reason:
            decode(frame)
    except InputError as error:
        return Result(
            result.id,
            ok=False,
            exit_code=result.exit_code,
            seconds=result.seconds,
            max_rss=result.max_rss,
            reason=f"cannot use reply: {error.text}",
            code="bad-reply",
        )
    return result


def _result(job: Job, outcome: Outcome, last: dict[str, Any] | None, limits: dict[str, Any]) -> Result:
    reply, code, reason = _judge(outcome, last, limits)
    return Result(
        id=job.id,
        ok=not code,
        reply=reply,
        exit_code=outcome.exit_code,
        signal=outcome.signal,
        seconds=outcome.seconds,
        max_rss=outcome.max_rss,
        stderr=outcome.stderr,
        reason=reason,
        code=code,
    )


def _judge(
    outcome: Outcome, last: dict[str, Any] | None, limits: dict[str, Any]
) -> tuple[dict[str, Any], str, str]:
    """(reply, code, reason). Good is only: exit 0, and a reply as the last word."""
    if outcome.cut:
        text = CUT.get(outcome.cut, f"cannot finish job: it was killed ({outcome.cut})")
        return {}, CODE_OF_CUT.get(outcome.cut, outcome.cut), text.format(**limits)
    if outcome.signal:
        return {}, "signal", f"cannot run job: the runner was ended by {signal_name(outcome.signal)}"
    if last is not None and last.get("ok") is False:
        code, text = _error_of(last)
        return {}, code, text
    reply = last.get("reply") if last is not None and last.get("ok") is True else None
    if outcome.exit_code == 0 and isinstance(reply, dict):
        return reply, "", ""
    got = f"exit {outcome.exit_code} and {'no' if last is None else 'no good'} reply"
    if isinstance(reply, dict):
        got = f"exit {outcome.exit_code} after the reply"
    return {}, "failed", f"cannot run job: expected exit 0 and a reply, got {got}"


def _error_of(said: dict[str, Any]) -> tuple[str, str]:
    """The runner's words, which may be the module's: short, and texts for certain."""
    told = said.get("error")
    error = told if isinstance(told, dict) else {}
    code, text = error.get("code"), error.get("text")
    return (
        code[:64] if isinstance(code, str) and code else "failed",
        text[:500] if isinstance(text, str) and text else "cannot run job: the runner said no, and not why",
    )


def _killer(kill: Callable[[str], None]) -> Callable[[asyncio.Future[str]], None]:
    def on_stop(stop: asyncio.Future[str]) -> None:
        if not stop.cancelled():
            kill(stop.result())

    return on_stop


async def _let_go(asking: asyncio.Future[dict[str, Any]]) -> None:
    """End a question that nobody waits for any more."""
    if not asking.done():
        asking.cancel()
        await asyncio.wait([asking])
