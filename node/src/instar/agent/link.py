"""One open control channel: messages out, messages in. Knows nothing about what they mean."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import NamedTuple

from instar.agent.dial import Dialer, Stream
from instar.core.errors import InputError, ServerRefused, ServerUnreachable
from instar.wire.codec import decode, encode
from instar.wire.messages import MAX_FRAME, Error, Message
from instar.wire.websocket import ClientSocket, Closed, Event, Opened, Rejected, Text, TooLarge

READ_SIZE = 65_536
UPGRADE_WITHIN_S = 10.0
DRAIN_WITHIN_S = 10.0
CLOSE_WITHIN_S = 0.05
PATH = "/v1/channel"


class Refusal(ServerRefused):
    """The server said no; come back after `retry_after_s` at the earliest."""

    def __init__(self, code: str, text: str, retry_after_s: float) -> None:
        super().__init__(code, text)
        self.retry_after_s = retry_after_s


class Unusable(NamedTuple):
    """A frame that could not be read; an `error` has been sent back."""

    problem: InputError


Incoming = Message | Unusable


class Link:
    """An upgraded connection. Made by `open_link`; every wait in it is bounded."""

    def __init__(self, stream: Stream, socket: ClientSocket) -> None:
        self._reader, self._writer = stream
        self._socket = socket
        self._early: list[Event] = []
        self._end: Exception | None = None

    def send(self, message: Message) -> None:
        """Write now. Raises InputError when no frame can hold `message`."""
        self._socket.send_text(encode(message))
        self._flush()

    def pin(self) -> str:
        """The SHA-256, hexadecimal, of the certificate that the server showed; '' when there is none."""
        secured = self._writer.get_extra_info("ssl_object")
        shown = secured.getpeercert(binary_form=True) if secured is not None else None
        return hashlib.sha256(shown).hexdigest() if shown else ""

    async def receive(self, within_s: float) -> list[Incoming]:
        """What came, in order; [] when `within_s` passed without a whole message.

        Raises ServerUnreachable when the connection ended, Refusal when HTTP refused it; never
        before everything that came earlier has been returned.
        """
        if self._end is not None:
            raise self._end
        found: list[Incoming] = []
        for event in self._early or await self._events(within_s):
            if isinstance(event, Text):
                found.append(self._read(event.data))
            elif isinstance(event, TooLarge):
                text = f"cannot read frame: expected at most {MAX_FRAME} bytes, got {event.size}"
                found.append(self._answer(InputError("frame-too-large", text)))
            elif isinstance(event, (Closed, Rejected)):
                self._end = _ended(event)
        self._early = []
        if self._end is not None and not found:
            raise self._end
        return found

    async def upgrade(self, within_s: float) -> None:
        """Send the request and wait for the server's yes. Raises as `receive` does."""
        self._flush()
        loop = asyncio.get_running_loop()
        end = loop.time() + within_s
        while (left := end - loop.time()) > 0:
            events = await self._events(left)
            for number, event in enumerate(events):
                if isinstance(event, Opened):
                    self._early = events[number + 1 :]
                    return
                if isinstance(event, (Closed, Rejected)):
                    raise _ended(event)
        raise ServerUnreachable("server-silent", f"cannot open the channel: no answer within {within_s:g} s")

    async def _events(self, within_s: float) -> list[Event]:
        try:
            async with asyncio.timeout(within_s):
                data = await self._reader.read(READ_SIZE)
        except TimeoutError:
            return []
        except OSError as error:
            text = f"cannot go on: the connection broke: {error.strerror or error}"
            raise ServerUnreachable("connection-lost", text) from error
        events = self._socket.receive(data)
        self._flush()
        await self._drain()
        return events

    async def close(self, code: int = 1000) -> None:
        """Say goodbye and let go, without waiting for the peer. Idempotent."""
        self._socket.close(code)
        self._flush()
        try:
            async with asyncio.timeout(CLOSE_WITHIN_S):
                await self._writer.drain()
        except (TimeoutError, OSError):
            pass  # the goodbye is a courtesy
        self._writer.transport.abort()

    def cut(self) -> None:
        """Break the connection without a word; whoever receives from it learns that it is lost."""
        self._writer.transport.abort()

    def _read(self, text: str) -> Incoming:
        try:
            return decode(text)
        except InputError as problem:
            return self._answer(problem)

    def _answer(self, problem: InputError) -> Unusable:
        self.send(Error(problem.code, problem.text))
        return Unusable(problem)

    def _flush(self) -> None:
        data = self._socket.take()
        if data and not self._writer.is_closing():
            self._writer.write(data)

    async def _drain(self) -> None:
        """Read no more from a peer that reads nothing."""
        try:
            async with asyncio.timeout(DRAIN_WITHIN_S):
                await self._writer.drain()
        except (TimeoutError, OSError) as error:
            text = f"cannot send: the peer took nothing for {DRAIN_WITHIN_S:g} s"
            raise ServerUnreachable("connection-lost", text) from error


async def open_link(dialer: Dialer, program_header: str) -> Link:
    """Dial and upgrade. Raises ServerUnreachable, Refusal or MachineError."""
    stream = await dialer.dial()
    socket = ClientSocket(str(dialer.server), PATH, {"Instar-Program": program_header}, MAX_FRAME)
    link = Link(stream, socket)
    try:
        await link.upgrade(UPGRADE_WITHIN_S)
    except BaseException:
        stream[1].transport.abort()
        raise
    return link


def _ended(event: Closed | Rejected) -> Exception:
    if isinstance(event, Closed):
        words = f"{event.code} {event.reason[:200]}".strip()
        return ServerUnreachable("connection-lost", f"cannot go on: the server closed the channel: {words}")
    code, text = f"http-{event.status}", ""
    try:
        said = json.loads(event.body)["error"]
        code, text = str(said["code"])[:64], str(said["message"])[:500]
    except (ValueError, KeyError, TypeError):
        pass  # a proxy or a load balancer answered: the status must do
    if event.status == 429 or event.status >= 500:
        words = text or f"HTTP {event.status}"
        return Refusal(code, f"cannot open the channel now: {words}", event.retry_after_s)
    words = text or f"expected HTTP 101, got {event.status}"
    return Refusal(code, f"cannot open the channel: {words}", max(event.retry_after_s, 1.0))
