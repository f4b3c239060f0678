"""The client's side of one WebSocket, without I/O: bytes in, events out, bytes to send out.

It answers pings, joins fragments, and bounds what a peer can make us hold: a text of more than `limit`
bytes is dropped as it comes and reported as `TooLarge` while the connection stays; past `limit` *
DROP_FACTOR the peer is cut off with close code 1009.

Our own code, because the library that we had (wsproto with h11) took 2 MiB and 18 ms of every start:
docs/adr/0005-own-websocket-client.md. The tests hold it against that library's server side.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from instar.core.errors import InputError
from instar.wire import frames
from instar.wire.frames import Control, Header, Parser, Payload
from instar.wire.upgrade import Answer, request

DROP_FACTOR = 16
REJECTION_BODY = 4096  # bytes of an HTTP error's body that are kept
NORMAL, PROTOCOL_FAULT, BAD_DATA, NO_CODE, ABNORMAL, BAD_TEXT, TOO_BIG = (
    1000,
    1002,
    1003,
    1005,
    1006,
    1007,
    1009,
)
MOST_REASON = 123  # bytes, of a close frame's text


class Opened(NamedTuple):
    """The server took the upgrade."""


class Text(NamedTuple):
    data: str


class TooLarge(NamedTuple):
    """A text over the limit came and was dropped; `size` is in bytes."""

    size: int


class Rejected(NamedTuple):
    """The server answered the upgrade with an HTTP error. `retry_after_s` is 0 when it names none."""

    status: int
    body: bytes
    retry_after_s: float


class Closed(NamedTuple):
    """Nothing more will come. `code` is 1006 when the peer broke the protocol or just went away."""

    code: int
    reason: str


Event = Opened | Text | TooLarge | Rejected | Closed


class _FaultError(Exception):
    """The peer broke the protocol; `code` is what we close with."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class ClientSocket:
    """One connection. After `Closed` or `Rejected` it is of no more use."""

    def __init__(
        self,
        host: str,
        target: str,
        headers: dict[str, str],
        limit: int,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.limit = limit
        self.done = False
        self._random_bytes = random_bytes
        key = random_bytes(16)
        self._out = bytearray(request(host, target, headers, key))
        self._answer = Answer(key)
        self._body: bytearray | None = None  # of a rejection
        self._parser = Parser()
        self._opened = self._closing = False
        self._opcode = 0  # of the message under way; 0 between messages
        self._final = False
        self._kept = bytearray()  # of that message, while it is within the limit
        self._size = 0

    def take(self) -> bytes:
        """What is to be sent now: the upgrade request, texts, pongs, a close."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def send_text(self, text: str) -> None:
        """Queue one text frame; nothing happens when the connection is no longer open."""
        self._send(frames.TEXT, text.encode())

    def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Queue a close frame. Idempotent."""
        words = b"" if code == NO_CODE else code.to_bytes(2, "big") + reason.encode()[:MOST_REASON]
        self._send(frames.CLOSE, words)
        self._closing = True

    def receive(self, data: bytes) -> list[Event]:
        """Feed what came from the peer; b"" means that it went away."""
        if self.done:
            return []
        if not data:
            return self._end()
        found: list[Event] = []
        if not self._opened:
            data = self._upgrade(data, found)
        if self._opened:
            self._parser.feed(data)
            self._read(found)
        return found

    # --- the upgrade

    def _upgrade(self, data: bytes, found: list[Event]) -> bytes:
        """Take in a piece of the HTTP answer; what it held beyond the head is returned."""
        if self._body is None:
            try:
                data = self._answer.feed(data)
            except InputError as error:
                found += self._gone(ABNORMAL, error.text)
                return b""
            if self._answer.status == 0:
                return b""
            if self._answer.status == 101:
                self._opened = True
                found.append(Opened())
                return data
            self._body = bytearray()
        self._body += data[: REJECTION_BODY - len(self._body)]
        size = self._answer.fields.get("content-length", "")
        whole = size.isdecimal() and len(size) < 8 and len(self._body) >= min(int(size), REJECTION_BODY)
        if whole or "transfer-encoding" in self._answer.fields:  # its pieces are not worth a reader
            found += self._reject()
        return b""

    def _reject(self) -> list[Event]:
        self.done = True
        wait = self._answer.fields.get("retry-after", "")
        retry_after_s = float(wait) if wait.isdecimal() and len(wait) < 8 else 0.0
        chunked = "transfer-encoding" in self._answer.fields
        return [Rejected(self._answer.status, b"" if chunked else bytes(self._body or b""), retry_after_s)]

    def _end(self) -> list[Event]:
        if self._body is not None:  # the body was cut off; its status is what matters
            return self._reject()
        return self._gone(ABNORMAL, "" if self._opened else "the connection ended before the upgrade")

    # --- frames

    def _read(self, found: list[Event]) -> None:
        """Work off what is there. `found` keeps what came before a fault."""
        while not self.done:
            try:
                part = self._parser.next()
                if part is None:
                    return
                found += self._heed(part)
            except InputError as error:
                self.close(PROTOCOL_FAULT)
                found += self._gone(ABNORMAL, error.text)
            except _FaultError as fault:
                self.close(fault.code, str(fault))
                found += self._gone(ABNORMAL, str(fault))

    def _heed(self, part: frames.Part) -> list[Event]:
        if isinstance(part, Header):
            return self._begin(part)
        if isinstance(part, Payload):
            if self._size <= self.limit:
                self._kept += part.data
            return self._message() if part.last and self._final else []
        return self._obey(part)

    def _begin(self, frame: Header) -> list[Event]:
        """A frame of a message: its size is judged before a byte of it is kept."""
        if (frame.opcode == frames.CONTINUATION) != (self._opcode != 0):
            raise _FaultError(PROTOCOL_FAULT, "the peer mixed up the pieces of its messages")
        if frame.opcode == frames.BINARY:
            self.close(BAD_DATA, "expected text")
            return self._gone(BAD_DATA, "the peer sent a binary frame")
        self._opcode, self._final = frame.opcode or self._opcode, frame.final
        self._size += frame.size
        if self._size > self.limit:
            self._kept.clear()
        if self._size > self.limit * DROP_FACTOR:
            self.close(TOO_BIG, "frame too large")
            return self._gone(TOO_BIG, f"the peer sent a frame of {self._size} bytes or more")
        return self._message() if frame.final and frame.size == 0 else []

    def _message(self) -> list[Event]:
        size, raw = self._size, bytes(self._kept)
        self._opcode = self._size = 0
        self._kept.clear()
        if size > self.limit:
            return [TooLarge(size)]
        try:
            return [Text(raw.decode())]
        except UnicodeDecodeError:
            raise _FaultError(BAD_TEXT, "the peer sent a text that is not UTF-8") from None

    def _obey(self, frame: Control) -> list[Event]:
        if frame.opcode == frames.PING:
            self._send(frames.PONG, frame.data)
        elif frame.opcode == frames.CLOSE:
            code, reason = _close_words(frame.data)
            self.close(code, reason)
            return self._gone(code, reason)
        return []

    def _gone(self, code: int, reason: str) -> list[Event]:
        self.done = True
        return [Closed(code, reason)]

    def _send(self, opcode: int, payload: bytes) -> None:
        if self._opened and not self._closing:
            self._out += frames.masked(opcode, payload, self._random_bytes(4))


def _close_words(data: bytes) -> tuple[int, str]:
    """Code and reason of a close frame (RFC 6455, 7.4). Raises _FaultError."""
    if not data:
        return NO_CODE, ""
    code = int.from_bytes(data[:2], "big")
    named = 1000 <= code <= 1014 and code not in (1004, NO_CODE, ABNORMAL)
    if len(data) < 2 or not (named or 3000 <= code <= 4999):
        raise _FaultError(PROTOCOL_FAULT, "the peer closed with a code that is none")
    try:
        return code, data[2:].decode()
    except UnicodeDecodeError:
        raise _FaultError(BAD_TEXT, "the peer closed with a text that is not UTF-8") from None
