"""One client's connection: every wait has a bound, and so has what is kept of what it sends.

A head has a bound for the whole of it, not for each byte; a body may take its time, but must come on. So a
client that dribbles is cut off, however patiently it does so.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import NamedTuple

from instar.core.errors import InputError
from instar.updater.http.heads import END, MOST_HEAD

HEAD_S = 10.0  # for a whole head
KEPT_S = 30.0  # between two requests
SEND_S = 10.0  # for an answer, or a piece of a stream
LINGER_S, LINGER_BYTES = 2.0, 64 * 1024 * 1024  # what a refused client still sends is read and dropped
BLOCK = 65_536


class Pace(NamedTuple):
    """How fast a body must come: so many bytes in each so many seconds, and all of it in time."""

    stall_s: float = 60.0
    stall_bytes: int = 65_536
    whole_s: float = 3600.0


PACE = Pace()


class GoneError(Exception):
    """There is nobody to answer any more."""


class Connection:
    """Bytes from and to one client, over a socket with or without TLS. `peeked` was read before."""

    def __init__(self, sock: socket.socket, peeked: bytes = b"") -> None:
        self._socket = sock
        self._kept = bytearray(peeked)

    def head(self, first: bool) -> bytes:
        """The next request's head, without its empty line.

        Raises GoneError when the client has left, or never began; InputError `head-too-large`, `too-slow`.
        """
        end = time.monotonic() + (HEAD_S if first else KEPT_S)
        if not first and not self._kept:
            self._more(end, "a request")
            end = time.monotonic() + HEAD_S
        while (found := self._kept.find(END)) < 0:
            if len(self._kept) > MOST_HEAD:
                break
            self._more(end, f"a whole head within {HEAD_S:g} s")
        if found < 0 or found + len(END) > MOST_HEAD:
            text = f"cannot read the request: expected a head of at most {MOST_HEAD} bytes, got more"
            raise InputError("head-too-large", text)
        raw = bytes(self._kept[:found])
        del self._kept[: found + len(END)]
        return raw

    def _more(self, end: float, what: str) -> None:
        begun = bool(self._kept)
        try:
            data = self._receive(4096, end)
        except TimeoutError:
            if not begun:
                raise GoneError from None
            raise InputError("too-slow", f"cannot read the request: expected {what}, got less") from None
        if not data:
            raise GoneError
        self._kept += data

    def take(self, most: int, end: float) -> bytes:
        """At most `most` bytes of a body; b"" when the client ends early. Raises TimeoutError at `end`."""
        if self._kept:
            data = bytes(self._kept[:most])
            del self._kept[:most]
            return data
        return self._receive(most, end)

    def _receive(self, most: int, end: float) -> bytes:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        try:
            return self._socket.recv(most)
        except TimeoutError:
            raise
        except OSError:  # reset, or no TLS any more: the same as an early end
            return b""

    def send(self, data: bytes, within_s: float = SEND_S) -> None:
        """Raises GoneError when the client does not take it in time, or is gone."""
        end = time.monotonic() + within_s
        view = memoryview(data)
        try:
            while view:
                self._socket.settimeout(max(0.001, end - time.monotonic()))
                view = view[self._socket.send(view[:BLOCK]) :]
        except OSError:
            raise GoneError from None

    def finish(self) -> None:
        """Say that no more is to come, and read on for a moment: to close on bytes that were not read would
        take the answer away from the client. Never raises."""
        end, left = time.monotonic() + LINGER_S, LINGER_BYTES
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while left > 0 and (data := self._receive(BLOCK, end)):
                left -= len(data)


class Body:
    """A request's body, as a file to be read once; `done` counts its bytes as they go by."""

    def __init__(self, connection: Connection, length: int, pace: Pace = PACE) -> None:
        self._connection, self.length, self._pace = connection, length, pace
        self.done = 0
        now = time.monotonic()
        self._end = now + pace.whole_s
        self._window = (now + pace.stall_s, 0)  # until then, enough more than this must have come

    def read(self, most: int, /) -> bytes:
        """What there is, at most so many bytes; b"" at the body's end. Raises InputError `cut-off`, `too-slow`."""
        size = min(most, BLOCK, self.length - self.done)
        if not size:
            return b""
        until, before = self._window
        try:
            data = self._connection.take(size, min(until, self._end))
        except TimeoutError:
            pace = self._pace
            wanted = f"{pace.stall_bytes} bytes in {pace.stall_s:g} s, and all within {pace.whole_s:g} s"
            text = f"cannot read the body: expected {wanted}, got {self.done} of {self.length} bytes"
            raise InputError("too-slow", text) from None
        if not data:
            text = f"cannot read the body: expected {self.length} bytes, got {self.done}"
            raise InputError("cut-off", text)
        self.done += len(data)
        if self.done - before >= self._pace.stall_bytes:
            self._window = (time.monotonic() + self._pace.stall_s, self.done)
        return data

    def whole(self) -> bytes:
        """All of a short body at once. Raises as `read` does."""
        return b"".join(iter(lambda: self.read(BLOCK), b""))
