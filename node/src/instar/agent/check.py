"""The rehearsal of a service module, for the updater: started and stopped again on a copy of its data.

It is done here because only here a module finds what it will find later: this process's rights, its view of
the machine, its place in the cgroup tree. The updater's unit may do far less. The request can be put again at
any time, and is answered after a while with what is known:

    {"do": "check-module", "module", "version", "digest", "data": "/…/staging/<tx>/rehearsal/data", "within_s"}
    {"done": false}  or  {"done": true, "passed": bool, "code", "text", "seconds"}
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from instar.agent.asking import error_of
from instar.agent.service import Starter, serve_request, tell
from instar.agent.shelf import Module, Shelf
from instar.core.errors import InputError, InstarError, MachineError
from instar.host.layout import Layout
from instar.host.points import reach

ANSWER_S = 10.0  # one request is held open for
MOST_S = 600.0
MOST_CHECKS = 4
CODES = {"output": "too-much-output", "memory": "out-of-memory", "processes": "processes"}  # of a cut
Key = tuple[str, str, str]


class Checks:
    """Rehearsals under way, and the ends of those that nobody has asked for yet."""

    def __init__(self, layout: Layout, shelf: Shelf, runners: Starter) -> None:
        self._layout, self._shelf, self._runners = layout, shelf, runners
        self._tasks: dict[Key, asyncio.Task[dict[str, Any]]] = {}

    async def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Begin the check, or go on waiting for it. Raises InputError `bad-request`, `no-module`, `busy`."""
        name, version, digest, data = (_text(request, key) for key in ("module", "version", "digest", "data"))
        key = (name, digest, data)
        task = self._tasks.get(key)
        if task is None:
            folder, within_s = self._data(data), _seconds(request)
            module = self._shelf.find(name, version, digest)
            if module is None:
                raise InputError("no-module", f"cannot check {name} {version}: it is not on the disk, whole")
            self._forget_ended()
            task = asyncio.create_task(self._check(module, folder, within_s), name=f"check {name}")
            self._tasks[key] = task
        await asyncio.wait([task], timeout=ANSWER_S)
        if not task.done():
            return {"done": False}
        self._tasks.pop(key, None)  # another connection may have asked the same
        return {"done": True, **task.result()}

    def _data(self, data: str) -> Path:
        path = Path(data)
        if not path.is_relative_to(self._layout.staging) or ".." in path.parts or not path.is_dir():
            text = f"cannot check: expected a data folder below {self._layout.staging}, got {data!a:.200}"
            raise InputError("bad-request", text)
        return path

    def _forget_ended(self) -> None:
        for key in [key for key, task in self._tasks.items() if task.done()]:
            del self._tasks[key]
        if len(self._tasks) >= MOST_CHECKS:
            raise InputError("busy", f"cannot check: {MOST_CHECKS} checks are under way")

    async def _check(self, module: Module, data: Path, within_s: float) -> dict[str, Any]:
        answer: dict[str, Any] = {}

        def heed(said: dict[str, Any]) -> None:
            if isinstance(said.get("ok"), bool):
                answer.update(said)

        try:
            request = serve_request(module, self._layout.module(module.manifest.name))
            request |= {"do": "check", "data": str(data)}
            request["limits"]["seconds"] = within_s
            run = await self._runners.start(request, heed, data, False)
        except InstarError as error:  # for another machine, say
            return _end(False, error.code, error.text, 0.0)
        except OSError as error:
            raise MachineError("cannot-run", f"cannot check {module.manifest.name}: {error}") from error
        reach("check:begun")
        try:
            if not await run.ended(within_s):
                run.kill("deadline")
        finally:
            outcome = await run.outcome()
        if answer.get("ok") is False:
            fault = error_of(answer, "bad-reply")
            return _end(False, fault.code, fault.text, outcome.seconds)
        if not answer or outcome.cut or outcome.exit_code or outcome.signal:
            code = CODES.get(outcome.cut, "rehearsal-failed")
            return _end(False, code, f"in its rehearsal {tell(outcome, '')}", outcome.seconds)
        return _end(True, "", "", outcome.seconds)


def _end(passed: bool, code: str, text: str, seconds: float) -> dict[str, Any]:
    return {"passed": passed, "code": code, "text": text, "seconds": seconds}


def _text(request: dict[str, Any], key: str) -> str:
    value = request.get(key)
    if not isinstance(value, str) or not value:
        raise InputError("bad-request", f"cannot check: expected {key!r} to be a text")
    return value


def _seconds(request: dict[str, Any]) -> float:
    with contextlib.suppress(TypeError, ValueError):
        value = float(request["within_s"]) if "within_s" in request else 0.0
        if 0 < value <= MOST_S:
            return value
    raise InputError("bad-request", f"cannot check: expected 'within_s' of 0 to {MOST_S:g} seconds")
