"""The client's side of one WebSocket, without I/O: bytes in, events out, bytes to send out.

A thin layer over wsproto. It answers pings, joins fragments, and bounds what a peer can make us
hold: a text of more than `limit` bytes is dropped and reported as `TooLarge` while the connection
stays; past `limit` * DROP_FACTOR the peer is cut off with close code 1009.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from wsproto import ConnectionType, WSConnection, events
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

DROP_FACTOR = 16
REJECTION_BODY = 4096  # bytes of an HTTP error's body that are kept
TOO_BIG = 1009
BAD_DATA = 1003
ABNORMAL = 1006


@dataclass(frozen=True, slots=True)
class Opened:
    """The server took the upgrade."""


@dataclass(frozen=True, slots=True)
class Text:
    data: str


@dataclass(frozen=True, slots=True)
class TooLarge:
    """A text over the limit came and was dropped; `size` is in bytes."""

    size: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """The server answered the upgrade with an HTTP error. `retry_after_s` is 0 when it names none."""

    status: int
    body: bytes
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Closed:
    """Nothing more will come. `code` is 1006 when the peer broke the protocol or just went away."""

    code: int
    reason: str


Event = Opened | Text | TooLarge | Rejected | Closed


class _AsciiHost(str):
    """A host name that is ASCII already. wsproto encodes it by 'idna', whose tables take 700 KiB."""

    __slots__ = ()

    def encode(self, encoding: str = "ascii", errors: str = "strict") -> bytes:
        return super().encode("ascii", errors)


class ClientSocket:
    """One connection. After `Closed` or `Rejected` it is of no more use."""

    def __init__(self, host: str, target: str, headers: dict[str, str], limit: int) -> None:
        self.limit = limit
        self.done = False
        self._opened = False
        self._socket = WSConnection(ConnectionType.CLIENT)
        extra = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
        request = events.Request(host=_AsciiHost(host), target=target, extra_headers=extra)
        self._out = bytearray(self._socket.send(request))
        self._parts = io.StringIO()
        self._size = 0
        self._rejection: tuple[int, float] | None = None
        self._body = bytearray()

    def take(self) -> bytes:
        """What is to be sent now: the upgrade request, texts, pongs, a close."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def send_text(self, text: str) -> None:
        """Queue one text frame; nothing happens when the connection is no longer open."""
        self._send(events.TextMessage(data=text))

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Queue a close frame. Idempotent."""
        self._send(events.CloseConnection(code=code, reason=reason))

    def receive(self, data: bytes) -> list[Event]:
        """Feed what came from the peer; b"" means that it went away."""
        if self.done:
            return []
        try:
            if not data and not self._opened:
                return self._gone(ABNORMAL, "the connection ended before the upgrade")
            self._socket.receive_data(data or None)
            found: list[Event] = []
            for event in self._socket.events():
                found += self._heed(event)
                if found and isinstance(found[-1], (Closed, Rejected)):
                    break
            return found
        except (RemoteProtocolError, LocalProtocolError) as error:
            return self._gone(ABNORMAL, str(error) or "the peer broke the protocol")

    def _heed(self, event: events.Event) -> list[Event]:
        if isinstance(event, events.TextMessage):
            return self._collect(event)
        if isinstance(event, events.Ping):
            self._send(event.response())
        elif isinstance(event, events.AcceptConnection):
            self._opened = True
            return [Opened()]
        elif isinstance(event, events.CloseConnection):
            self._send(event.response())
            return self._gone(int(event.code), event.reason or "")
        elif isinstance(event, events.BytesMessage):
            self.close(BAD_DATA, "expected text")
            return self._gone(BAD_DATA, "the peer sent a binary frame")
        elif isinstance(event, events.RejectConnection):
            self._rejection = (event.status_code, _retry_after(event.headers))
            if not event.has_body:
                return self._reject()
        elif isinstance(event, events.RejectData):
            self._body += event.data[: REJECTION_BODY - len(self._body)]
            if event.body_finished:
                return self._reject()
        return []

    def _collect(self, event: events.TextMessage) -> list[Event]:
        """Join fragments. Past the limit only their sizes are counted."""
        self._size += len(event.data.encode())
        if self._size > self.limit:
            self._parts = io.StringIO()
            if self._size > self.limit * DROP_FACTOR:
                self.close(TOO_BIG, "frame too large")
                return self._gone(TOO_BIG, f"the peer sent a frame of over {self._size} bytes")
        else:
            self._parts.write(event.data)
        if not event.message_finished:
            return []
        size, text = self._size, self._parts.getvalue()
        self._size, self._parts = 0, io.StringIO()
        return [TooLarge(size)] if size > self.limit else [Text(text)]

    def _reject(self) -> list[Event]:
        status, retry_after_s = self._rejection or (0, 0.0)
        self.done = True
        return [Rejected(status, bytes(self._body), retry_after_s)]

    def _gone(self, code: int, reason: str) -> list[Event]:
        self.done = True
        if self._rejection is not None:  # the body was cut off; its status is what matters
            return self._reject()
        return [Closed(code, reason)]

    def _send(self, event: events.Event) -> None:
        try:
            self._out += self._socket.send(event)
        except LocalProtocolError:
            return  # not open (any more): who reads from this socket learns that from its events


def _retry_after(headers: list[tuple[bytes, bytes]]) -> float:
    for name, value in headers:
        if name.lower() == b"retry-after" and value.isdigit() and len(value) < 8:
            return float(value)
    return 0.0
