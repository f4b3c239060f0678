"""The control line's end in the agent, and the tail of what a runner writes to standard error.

Both are the output of a process that nobody trusts. What comes faster than RATE is left in the pipe,
so that the writer is held up and not we.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable
from typing import Any

from instar.wire.messages import MAX_FRAME

RATE = 4 << 20  # bytes a second that are read of one pipe
READ_SIZE = 65_536
MOST_UNSENT = 4 * MAX_FRAME  # bytes that a runner has not taken; then it is ended
DRAIN = 64 << 20  # bytes that are read of a pipe whose writers are dead: more than fits into one


class Inflow:
    """Reads a descriptor in the event loop and hands over what comes. Owns the descriptor."""

    def __init__(self, fd: int, take: Callable[[bytes], None]) -> None:
        os.set_blocking(fd, False)
        self._fd, self._take = fd, take
        self._loop = asyncio.get_running_loop()
        self._second, self._came = self._loop.time(), 0
        self._rest: asyncio.TimerHandle | None = None
        self._loop.add_reader(fd, self._readable)

    def drain(self) -> None:
        """Take what is there already."""
        left = DRAIN
        while left > 0 and (size := self._pull()) > 0:
            left -= size

    def close(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _readable(self) -> None:
        size = self._pull()
        if size == 0:
            self._loop.remove_reader(self._fd)
        now = self._loop.time()
        if now - self._second >= 1.0:
            self._second, self._came = now, 0
        self._came += max(size, 0)
        if self._came > RATE:
            self._loop.remove_reader(self._fd)
            self._rest = self._loop.call_later(self._second + 1.0 - now, self._resume)

    def _resume(self) -> None:
        self._rest = None
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._readable)

    def _pull(self) -> int:
        """Bytes that were taken; 0 at the end, -1 when there is nothing more now."""
        if self._fd < 0:
            return 0
        try:
            chunk = os.read(self._fd, READ_SIZE)
        except BlockingIOError:
            return -1
        except OSError:  # a reset: its end went away with something unread
            return 0
        if chunk:
            self._take(chunk)
        return len(chunk)


class Tail:
    """Keeps the last `kept` bytes. Calls `too_much` once, when `most` have come (0: never)."""

    def __init__(self, fd: int, kept: int) -> None:
        self.most = 0
        self.too_much: Callable[[], None] = _nothing
        self._kept, self._seen = kept, 0
        self._data = bytearray()
        self._inflow = Inflow(fd, self._take)

    def text(self) -> str:
        return self._data.decode("utf-8", "replace")

    def drain(self) -> None:
        self._inflow.drain()

    def close(self) -> None:
        self._inflow.close()

    def _take(self, chunk: bytes) -> None:
        before, self._seen = self._seen, self._seen + len(chunk)
        self._data += chunk
        del self._data[: -self._kept]
        if before <= self.most < self._seen and self.most:
            self.too_much()


class ControlLine:
    """JSON objects, one a line, both ways. `heed` gets what the runner says; what is no object is dropped."""

    def __init__(self, end: socket.socket) -> None:
        self.most = 0  # bytes that may come in all; 0: any number
        self.heed: Callable[[dict[str, Any]], None] = _drop
        self.too_much: Callable[[], None] = _nothing
        self._out, self._in, self._seen, self._over = bytearray(), bytearray(), 0, False
        end.setblocking(False)
        self._end = end
        self._inflow = Inflow(os.dup(end.fileno()), self._take)

    def say(self, message: dict[str, Any]) -> None:
        """Send, now or as soon as the runner reads. Dropped when it is gone."""
        if self._end.fileno() < 0:
            return
        idle = not self._out
        self._out += json.dumps(message).encode() + b"\n"
        if idle:
            self._flush()
        if len(self._out) > MOST_UNSENT:
            self._out.clear()
            self.too_much()

    def drain(self) -> None:
        self._inflow.drain()

    def close(self) -> None:
        self._inflow.close()
        self._stop_writing()
        self._end.close()

    def _flush(self) -> None:
        try:
            del self._out[: self._end.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:  # it has closed its end
            self._out.clear()
        if self._out:
            asyncio.get_running_loop().add_writer(self._end.fileno(), self._flush)
        else:
            self._stop_writing()

    def _stop_writing(self) -> None:
        if self._end.fileno() >= 0:
            asyncio.get_running_loop().remove_writer(self._end.fileno())

    def _take(self, chunk: bytes) -> None:
        if self._over:
            return
        self._seen += len(chunk)
        self._in += chunk
        *lines, rest = self._in.split(b"\n")
        self._in = rest
        if (self.most and self._seen > self.most) or any(len(line) > MAX_FRAME for line in (*lines, rest)):
            self._over = True
            self._in.clear()
            self.too_much()
            return
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(message, dict):
                self.heed(message)


def _nothing() -> None:
    pass


def _drop(_message: dict[str, Any]) -> None:
    pass
