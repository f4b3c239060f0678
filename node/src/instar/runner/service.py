"""A module that stays: its own steps and the agent's questions, one after the other, until it is to stop.

    agent   {"do": "request", "id", "args"}     runner  {"answer": id, "ok", "reply" | "error"}
            {"do": "stop"}                              {"stopping": "busy", "text"} every second, then
                                                        {"stopping": "ready"}, and exit 0
                                                        {"state": "ok" | "failed", "text"} when it changes

The end of the control line and SIGTERM mean stop, too; then there is a bound, for nobody else may be there to
set one. One thread: a step or a request that does not come back delays all else, and the agent sees that.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from types import FrameType
from typing import Any

from instar.core.errors import InputError, InstarError
from instar.modules.context import Context
from instar.runner.border import call, flush, tell
from instar.runner.kinds import Loaded
from instar.runner.line import ControlLine, Voice, encode
from instar.trust.fields import Fields

LEAST_STEP_S, MOST_STEP_S = 0.01, 86_400.0  # a module that wants to be called at once must not spin
HEALTH_EVERY_S = 5.0
ASK_EVERY_S = 0.05  # whether it is ready to stop
BUSY_EVERY_S = 1.0
ALONE_S = 20.0  # how long a busy module may go on when the agent is gone
NEVER = math.inf


class Service:
    """`run` is the whole of it."""

    def __init__(self, line: ControlLine, voice: Voice, loaded: Loaded, context: Context) -> None:
        self._line, self._voice, self._loaded, self._context = line, voice, loaded, context
        self._next_step = self._next_health = NEVER
        self._sick = ""  # what its health said last
        self._stop_asked = self._next_ask = self._next_busy = NEVER
        self._terminated = False

    def run(self) -> None:
        """Start it, and return after its stop. Raises InstarError when the module fails for good."""
        self._heed_term()
        call("start module", self._loaded.start, self._context)
        self._line.say({"state": "ready"})
        self._next_step = self._next_health = time.monotonic()
        while not self._stopped(time.monotonic()):
            self._own_work()
            flush()
            first = min(self._next_step, self._next_health, self._next_ask)
            self._line.wait(min(first - time.monotonic(), MOST_STEP_S))
            self._hear()

    def _heed_term(self) -> None:
        read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._line.wake_by(read_end)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_term)

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True
        signal.alarm(math.ceil(ALONE_S) + 5)  # also for a module that does not come back

    # --- its own work

    def _own_work(self) -> None:
        if time.monotonic() >= self._next_step:
            wish = call("go on with module", self._loaded.step, self._context)
            self._next_step = time.monotonic() + _seconds(wish)
        if time.monotonic() >= self._next_health:
            self._look_at_health()

    def _look_at_health(self) -> None:
        self._next_health = time.monotonic() + HEALTH_EVERY_S
        try:
            sick = call("ask module for its health", self._loaded.health, self._context)
        except InstarError as error:
            if error.code == "wasm-trap":  # it cannot be entered again: a new process is what helps
                raise
            sick = error.text
        if sick != self._sick:
            self._sick = sick
            self._line.say({"state": "failed", "text": sick[:1000]} if sick else {"state": "ok"})

    # --- the agent's lines

    def _hear(self) -> None:
        while True:
            try:
                message = self._line.next()
                if message is None:
                    return
                self._obey(message)
            except InputError as error:
                tell(error.text)

    def _obey(self, message: dict[str, Any]) -> None:
        do = message.get("do")
        if do == "request":
            line = Fields(message, "request", "bad-job")
            self._answer(line.get("id", str), line.optional("args", {}))
        elif do == "stop":
            self._ask_to_stop()
        else:
            raise InputError("bad-job", f"cannot obey: expected 'request' or 'stop', got {do!a:.60}")

    def _answer(self, request: str, args: dict[str, Any]) -> None:
        """Whatever comes of one request, the service goes on."""
        from instar.runner.work import reply_of

        self._voice.begin(request)
        self._context.args = args
        try:
            if self._stop_asked < NEVER:
                raise InstarError("stopping", "cannot answer: the module is told to stop")
            returned = call("answer", self._loaded.request, args, self._context)
            body = reply_of(self._context, returned)
            self._voice.count(len(body))
            raw = b'{"answer":%s,"ok":true,"reply":%s}\n' % (json.dumps(request).encode(), body)
        except InstarError as error:
            tell(error.text)
            raw = encode({"answer": request, "ok": False, "error": error.as_json()})
        self._context.take_built()
        self._voice.begin(None)
        flush()
        self._line.say_raw(raw)
        self._next_health = min(self._next_health, time.monotonic())

    # --- the stop

    def _ask_to_stop(self) -> None:
        if self._stop_asked == NEVER:
            self._stop_asked = self._next_ask = self._next_busy = time.monotonic()

    def _stopped(self, now: float) -> bool:
        """Whether it has stopped. Asks the module whether it may, when it is to and when that is due."""
        alone = self._line.ended or self._terminated
        if alone:
            self._ask_to_stop()
        if now < self._next_ask:
            return False
        self._next_ask = now + ASK_EVERY_S
        if self._ready() or (alone and now >= self._stop_asked + ALONE_S):
            call("stop module", self._loaded.stop, self._context)
            flush()
            self._line.say({"stopping": "ready"})
            return True
        if now >= self._next_busy:
            self._next_busy = now + BUSY_EVERY_S
            self._line.say({"stopping": "busy", "text": "an operation is under way"})
        return False

    def _ready(self) -> bool:
        try:
            return call("ask module whether it may stop", self._loaded.ready_to_stop, self._context)
        except InstarError as error:
            tell(error.text)  # one that cannot say is not waited for
            return True


def _seconds(wish: object) -> float:
    """Until the next step. Raises InstarError `module-failed` for what is no number."""
    if wish is None:
        return NEVER
    if isinstance(wish, bool) or not isinstance(wish, int | float) or math.isnan(wish):
        text = f"cannot go on with module: expected its step to return seconds, got {wish!a:.60}"
        raise InstarError("module-failed", text)
    return min(max(float(wish), LEAST_STEP_S), MOST_STEP_S)
