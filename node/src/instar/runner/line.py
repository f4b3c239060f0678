"""The control line: JSON objects, one a line, both ways, over descriptor 3.

What a module prints goes elsewhere (1 and 2), so it cannot get between. A module that closed the descriptor, or
put another file in its place, is told so on standard error: nothing is written to a file that is not the line.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import time
from typing import Any

from instar.core.errors import InputError, InstarError

CONTROL = 3
MOST_LINE = 262_144  # bytes; the channel's largest frame, instar.wire.messages.MAX_FRAME
CHUNK = 65_536
GONE = 5  # exit status of a runner that nobody listens to any more


def encode(message: dict[str, Any]) -> bytes:
    """One line. What is no Unicode text is replaced: half a surrogate must not spoil what reads it later."""
    text = json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace") + b"\n"


class ControlLine:
    """Not for threads. `ended`: no more comes; the agent closed its end, is gone, or cannot be understood."""

    def __init__(self, fd: int = CONTROL) -> None:
        """Raises OSError when the descriptor is not open."""
        self._fd = fd
        self._socket = os.fstat(fd).st_ino
        self._rest = b""
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self.ended = False
        self._lost = False  # nobody reads what we say
        os.set_blocking(fd, True)
        os.set_inheritable(fd, False)  # not for what the module starts

    def wake_by(self, fd: int) -> None:
        """Let `wait` end when `fd` is readable, too."""
        self._poll.register(fd, select.POLLIN)

    # --- out

    def say(self, message: dict[str, Any]) -> int:
        """Send a line; returns its size. Waits while the agent does not read; says nothing once it is gone."""
        return self.say_raw(encode(message))

    def say_raw(self, line: bytes) -> int:
        """Raises InstarError `module-failed` when the module has taken the descriptor away."""
        self._check()
        view = memoryview(line)
        try:
            while view and not self._lost:
                view = view[os.write(self._fd, view) :]
        except (BrokenPipeError, ConnectionResetError):
            self._lost = True
            self._end()
        return len(line)

    def _check(self) -> None:
        try:
            found = os.fstat(self._fd).st_ino
        except OSError:
            found = -1
        if found != self._socket:
            raise InstarError("module-failed", "cannot answer: the module closed the runner's control line")

    # --- in

    def next(self) -> dict[str, Any] | None:
        """The next whole line that was received; None: there is none now. Raises InputError `bad-job`."""
        raw, found, rest = self._rest.partition(b"\n")
        if not found:
            if len(raw) > MOST_LINE:
                self._rest = b""
                self._end()
                raise InputError("bad-job", f"cannot read the agent's line: it is over {MOST_LINE} bytes")
            return None
        self._rest = rest
        try:
            message = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise InputError("bad-job", f"cannot read the agent's line: {error!s:.80}") from error
        if not isinstance(message, dict):
            got = type(message).__name__
            raise InputError("bad-job", f"cannot read the agent's line: expected an object, got {got}")
        return message

    def wait(self, within_s: float) -> None:
        """Wait at most so long for more to read (`next`), for the end (`ended`), or for what `wake_by` named."""
        self._check()
        if b"\n" in self._rest:  # came with the line before it
            within_s = 0.0
        ready = self._poll.poll(math.ceil(max(0.0, within_s) * 1000))
        for fd, _ in ready:
            chunk = b""
            with contextlib.suppress(ConnectionResetError):
                chunk = os.read(fd, CHUNK)
            if fd == self._fd:
                self._rest += chunk
                if not chunk:
                    self._end()

    def _end(self) -> None:
        """Nothing more comes, and nobody waits for it: `wait` must not return at once for ever."""
        self.ended = True
        with contextlib.suppress(KeyError):
            self._poll.unregister(self._fd)

    def first(self, within_s: float) -> dict[str, Any] | None:
        """The first line; None: the agent went away, or said nothing for so long. Raises InputError `bad-job`."""
        end = time.monotonic() + within_s
        while (message := self.next()) is None:
            if self.ended or time.monotonic() >= end:
                return None
            self.wait(end - time.monotonic())
        return message


class Voice:
    """What a module says through its context: counted, and marked with the request that it belongs to."""

    def __init__(self, line: ControlLine, most: int) -> None:
        """`most`: bytes of one run or request, reply included; 0: no bound."""
        self._line = line
        self._most = most
        self._said = 0
        self._request: str | None = None

    def begin(self, request: str | None) -> None:
        """What is said from now on belongs to `request` (None: to none) and is counted anew."""
        self._request, self._said = request, 0

    def emit(self, message: dict[str, Any]) -> None:
        """Send a line of the module. Raises InstarError `too-much-output`, and from then on always."""
        if self._request is not None:
            message = {"id": self._request, **message}
        raw = encode(message)
        self.count(len(raw))
        self._line.say_raw(raw)

    def count(self, size: int) -> None:
        """Add `size` bytes. Raises InstarError `too-much-output`."""
        self._said += size
        if self._most and self._said > self._most:
            text = f"cannot go on: expected at most {self._most} bytes of output, got more"
            raise InstarError("too-much-output", text)
