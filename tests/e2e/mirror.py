"""What may stand between a node and its gateway: a mirror that changes answers, and a plain CONNECT proxy.

The mirror ends the node's TLS with the fleet's own server certificate and goes on to the gateway with the
node's identity, so a test decides what the node sees, request by request. Each runs in a thread of its own.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instar.host.layout import Layout

CHUNK = 16_384
HOST = "127.0.0.1"
Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


@dataclass(frozen=True)
class Request:
    method: str
    target: str  # path and query
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


@dataclass(frozen=True)
class Answer:
    """Given in place of the gateway's. `body` may be anything that JSON has."""

    status: int
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)

    def data(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


@dataclass(frozen=True)
class Cut:
    """The connection ends, after `after` bytes of the gateway's answer (without its head)."""

    after: int = 0


@dataclass(frozen=True)
class Hostile:
    """A control channel that is ours: these bytes are sent, raw, after the upgrade."""

    frames: list[bytes]


Rule = Callable[[Request], Answer | Cut | Hostile | None]
Change = Callable[[Request, int, bytes], bytes]


def just_pass(request: Request) -> None:
    return None


class Loop:
    """An event loop in a thread, with one listening server."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.port = 0
        self.connections = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    async def listen(self, context: ssl.SSLContext | None) -> None:
        self._server = await asyncio.start_server(self._accept, HOST, 0, ssl=context)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def _accept(self, reader: Reader, writer: Writer) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self.serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError, ValueError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def serve(self, reader: Reader, writer: Writer) -> None:
        raise NotImplementedError

    def hang_up(self) -> None:
        """Cut every connection that is open now."""

        async def cut() -> None:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=3)

        self.run(cut())

    def close(self) -> None:
        if self._server is not None:
            self.loop.call_soon_threadsafe(self._server.close)
        self.hang_up()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)


class Mirror(Loop):
    """`rule` decides before the gateway is asked, `change` sees the body of its answer.

    `down` makes every connection end at once. `served` counts the bytes of bodies by path.
    """

    def __init__(self, gateway: tuple[str, int], certificate: Path, ca: Path) -> None:
        super().__init__()
        self.gateway = gateway
        self.rule: Rule = just_pass
        self.change: Change | None = None
        self.down = False
        self.served: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.heard: list[bytes] = []  # what nodes sent into a Hostile channel, unmasked
        self._out = ssl.create_default_context(cafile=str(ca))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.run(self.listen(context))

    @property
    def url(self) -> str:
        return f"https://{HOST}:{self.port}"

    def stand_before(self, layout: Layout) -> None:
        """Let the node whose folder this is, not running now, take us for its server."""
        body = json.loads(layout.node.read_bytes())
        layout.node.write_text(json.dumps({**body, "server": self.url}))
        self._out.load_cert_chain(layout.certificate, layout.key)

    async def serve(self, reader: Reader, writer: Writer) -> None:
        upstream: tuple[Reader, Writer] | None = None
        try:
            while not self.down and (head := await _head(reader)):
                request = await _request(head, reader)
                self.asked[request.path] += 1
                does = self.rule(request)
                if self.down:
                    return
                if isinstance(does, Answer):
                    writer.write(_answer(does))
                elif isinstance(does, Hostile):
                    await self._hostile(request, does, reader, writer)
                    return
                elif not isinstance(does, Cut) or does.after:
                    upstream = upstream or await asyncio.open_connection(*self.gateway, ssl=self._out)
                    upstream[1].write(head + request.body)
                    if "upgrade" in request.headers:
                        await _both(reader, writer, *upstream)
                        return
                    if not await self._relay(request, upstream[0], writer, does):
                        return
                else:
                    return
                await writer.drain()
        finally:
            if upstream is not None:
                upstream[1].transport.abort()

    async def _relay(self, request: Request, upstream: Reader, writer: Writer, cut: Cut | None) -> bool:
        head = await _head(upstream)
        headers = _headers(head)
        status, left = int(head.split(b" ", 2)[1]), int(headers.get("content-length", "0"))
        if self.change is not None:
            body = self.change(request, status, await upstream.readexactly(left))
            writer.write(_answer(Answer(status, body)))
            return True
        writer.write(head)
        most = cut.after if cut else left
        while left:
            data = await upstream.read(min(CHUNK, left, most))
            if not data:
                return False
            writer.write(data)
            await writer.drain()
            left, most = left - len(data), most - len(data)
            self.served[request.path] += len(data)
            if cut and not most:
                await asyncio.sleep(0.05)  # let it arrive: what is cut is the rest
                return False
        return True

    async def _hostile(self, request: Request, does: Hostile, reader: Reader, writer: Writer) -> None:
        key = request.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest())
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        for frame in does.frames:
            writer.write(frame)
        await writer.drain()
        while True:
            self.heard.append(await _masked_frame(reader))


class Proxy(Loop):
    """A CONNECT proxy. `tunnels` lists what was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.tunnels: list[str] = []
        self.run(self.listen(None))

    async def serve(self, reader: Reader, writer: Writer) -> None:
        method, target, _ = (await _head(reader)).split(b" ", 2)
        if method != b"CONNECT":
            writer.write(b"HTTP/1.1 405 No\r\n\r\n")
            return
        self.tunnels.append(target.decode())
        host, _, port = target.decode().rpartition(":")
        upstream = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await _both(reader, writer, *upstream)


def text_frame(text: str | bytes, size: int | None = None) -> bytes:
    """A server's frame; `size` claims another length than there is."""
    data = text.encode() if isinstance(text, str) else text
    claimed = len(data) if size is None else size
    if claimed < 126:
        return bytes((0x81, claimed)) + data
    if claimed < 65_536:
        return bytes((0x81, 126)) + struct.pack("!H", claimed) + data
    return bytes((0x81, 127)) + struct.pack("!Q", claimed) + data


async def _head(reader: Reader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:-2]
    pairs = (line.partition(":") for line in lines)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _request(head: bytes, reader: Reader) -> Request:
    method, target, _ = head.decode("latin-1").split(" ", 2)
    headers = _headers(head)
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(method, target, headers, body)


def _answer(answer: Answer) -> bytes:
    data = answer.data()
    lines = [f"HTTP/1.1 {answer.status} Mirror", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in answer.headers.items()]
    return "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data


async def _masked_frame(reader: Reader) -> bytes:
    first = await reader.readexactly(2)
    size = first[1] & 0x7F
    if size == 126:
        size = int.from_bytes(await reader.readexactly(2), "big")
    elif size == 127:
        size = int.from_bytes(await reader.readexactly(8), "big")
    mask = await reader.readexactly(4)
    data = await reader.readexactly(size)
    return bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))


async def _both(reader: Reader, writer: Writer, back: Reader, forth: Writer) -> None:
    """Copy both ways until one side ends."""

    async def copy(source: Reader, sink: Writer) -> None:
        while data := await source.read(CHUNK):
            sink.write(data)
            await sink.drain()

    tasks = [asyncio.ensure_future(copy(reader, forth)), asyncio.ensure_future(copy(back, writer))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        forth.transport.abort()
