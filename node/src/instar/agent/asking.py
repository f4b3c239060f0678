"""Questions to a running service module, over its control line. Each is answered once, or ends in an error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from instar.core.errors import InputError, InstarError, ReleaseError
from instar.wire.messages import MAX_FRAME

Heed = Callable[[dict[str, Any]], None]  # gets a request's log and progress lines
MOST_ASKED = 64  # at once, of one module


class Questions:
    """What is asked of one process of the module `name`. `say` writes a line to it."""

    def __init__(self, name: str, say: Heed) -> None:
        self._name, self._say = name, say
        self._open: dict[str, tuple[asyncio.Future[dict[str, Any]], Heed]] = {}
        self._asked = 0

    async def ask(self, args: dict[str, Any], deadline_s: float, heed: Heed) -> dict[str, Any]:
        """The reply. Raises InputError `bad-job`, ReleaseError with the module's own code, `deadline`, or
        what `end` was told."""
        if len(self._open) >= MOST_ASKED:
            raise InputError("bad-job", f"cannot ask {self._name}: {MOST_ASKED} questions are open already")
        self._asked += 1
        key = str(self._asked)
        line = {"do": "request", "id": key, "args": args}
        if len(json.dumps(line)) >= MAX_FRAME:
            text = f"cannot ask {self._name}: expected at most {MAX_FRAME} bytes, got more"
            raise InputError("bad-job", text)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._open[key] = (future, heed)
        try:
            self._say(line)
            async with asyncio.timeout(deadline_s):
                return await future
        except TimeoutError:
            text = f"cannot ask {self._name}: expected an answer within {deadline_s:g} s, got none"
            raise ReleaseError("deadline", text) from None
        finally:
            del self._open[key]

    def heed(self, said: dict[str, Any]) -> bool:
        """Take a line that belongs to a question; whether it did. One that came too late is dropped."""
        if isinstance(said.get("answer"), str):
            found = self._open.get(said["answer"])
            if found and not found[0].done():
                self._end(found[0], said)
            return True
        if isinstance(said.get("id"), str):
            if found := self._open.get(said["id"]):
                found[1](said)
            return True
        return False

    def end(self, code: str, text: str) -> None:
        """The process is gone: no open question will be answered."""
        for future, _ in self._open.values():
            if not future.done():
                future.set_exception(ReleaseError(code, f"cannot ask {self._name}: {text}"))

    def _end(self, future: asyncio.Future[dict[str, Any]], said: dict[str, Any]) -> None:
        reply = said.get("reply")
        if said.get("ok") is True and isinstance(reply, dict):
            future.set_result(reply)
        else:
            future.set_exception(error_of(said, "bad-reply"))


def error_of(said: dict[str, Any], default: str) -> InstarError:
    """The error that a runner's line tells, shortened; it is the module's word, not ours."""
    told = said.get("error")
    fault = told if isinstance(told, dict) else {}
    code, text = fault.get("code"), fault.get("text")
    return ReleaseError(
        code[:64] if isinstance(code, str) and code else default,
        text[:500] if isinstance(text, str) and text else "expected a reply or an error, got neither",
    )
