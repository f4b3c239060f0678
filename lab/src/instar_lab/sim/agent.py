"""One simulated agent: says hello, answers pings, jobs and commands, comes back when it is cut off.

It keeps to the reconnect rules of the real agent (floor, growing waits, jitter, the server's own
`retry_after_s`), because the time until all are back after a restart is one of the figures.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import ssl
import time
from collections.abc import Callable
from typing import Any, cast

from instar.agent.channel import STEADY_S
from instar.agent.main import RECONNECT
from instar.core.backoff import Backoff
from instar_lab.sim.frames import CLOSE, PING, PONG, TEXT, FrameReader, frame, upgrade
from instar_lab.sim.identities import Identity

BOOT_ID = "00000000-0000-4000-8000-000000000000"
CONNECT_WITHIN_S = 30.0


class Connection(asyncio.Protocol):
    """One connection. `closed` is done when it has ended; its result is the least time to stay away."""

    def __init__(self, agent: SimAgent, loop: asyncio.AbstractEventLoop) -> None:
        self.agent = agent
        self.closed: asyncio.Future[float] = loop.create_future()
        self.transport: asyncio.Transport | None = None
        self._reader: FrameReader | None = None
        self._head = b""
        self._stay_away_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport = cast(asyncio.Transport, transport)  # uvloop's has no common base
        headers = {"Instar-Program": f"agent {self.agent.version} {self.agent.digest}"}
        transport.write(upgrade(self.agent.place, "/v1/channel", os.urandom(16), headers))

    def data_received(self, data: bytes) -> None:
        if self._reader is None:
            self._head += data
            head, separator, data = self._head.partition(b"\r\n\r\n")
            if not separator:
                return
            if b" 101 " not in head.split(b"\r\n", 1)[0]:
                self.agent.trouble = (head + separator + data)[:300].decode(errors="replace")
                self._end()
                return
            self._reader = FrameReader()
            self.send(self.agent.hello())
        for kind, payload in self._reader.feed(data):
            self._heed(kind, payload)

    def _heed(self, kind: int, payload: bytes) -> None:
        if kind == TEXT:
            self._message(json.loads(payload))
        elif kind == PING and self.transport is not None:
            self.transport.write(frame(PONG, payload))
        elif kind == CLOSE:
            self._end()

    def _message(self, message: dict[str, Any]) -> None:
        match message["t"]:
            case "welcome":
                self.agent.welcomed(self)
            case "pong":
                self.agent.pongs += 1
                self.agent.counted()
            case "ping":
                self.send({"t": "pong", "n": message.get("n", 0)})
            case "job":
                if message.get("purpose") == "job":
                    self.send({"t": "taken", "id": message["id"]})
                self.send(self.agent.result(message))
            case "command":
                self.send({"t": "taken", "id": message["id"]})
                self.send(self.agent.status(message))
            case "ack":
                self.agent.acks += 1
            case "refused":
                self._stay_away_s = float(message.get("retry_after_s", 1.0))
                self.agent.trouble = f"{message['code']}: {message['message']}"
                self._end()

    def send(self, message: dict[str, Any]) -> None:
        if self.transport is not None:
            self.transport.write(frame(TEXT, json.dumps(message, separators=(",", ":")).encode()))

    def _end(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if not self.closed.done():
            self.closed.set_result(self._stay_away_s)


class SimAgent:
    """`changed` is called when it becomes connected or not; `counted` after each pong."""

    version = "0.0.0"

    def __init__(
        self, identity: Identity, host: str, port: int, chance: random.Random, changed: Callable[[int], None]
    ) -> None:
        self.identity, self.host, self.port = identity, host, port
        self.place = f"{host}:{port}"
        self.digest = hashlib.sha384(identity.node.encode()).hexdigest()
        self.connection: Connection | None = None
        self.connects = 0
        self.pongs = 0
        self.jobs = 0
        self.acks = 0
        self.trouble = ""
        self.counted: Callable[[], None] = lambda: None
        self._context: ssl.SSLContext = identity.context()
        self._chance = chance
        self._changed = changed
        self._started = time.time()

    async def run(self, first: asyncio.Semaphore) -> None:
        """Stay connected until cancelled. `first` bounds how many dial for the first time at once."""
        backoff = Backoff(*RECONNECT)
        async with first:
            ended = await self._dial()
        while True:
            began = time.monotonic()
            stay_away_s = await ended.closed if ended is not None else 0.0
            self._lost()
            if ended is not None and time.monotonic() - began >= STEADY_S:
                backoff.reset()
            own_s = backoff.next(self._chance.random()) * (1 + self._chance.random())
            await asyncio.sleep(max(own_s, stay_away_s * (1 + 0.1 * self._chance.random())))
            ended = await self._dial()

    async def _dial(self) -> Connection | None:
        loop = asyncio.get_running_loop()
        connection = Connection(self, loop)
        try:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                await loop.create_connection(
                    lambda: connection, self.host, self.port, ssl=self._context, server_hostname=self.host
                )
        except (OSError, TimeoutError) as error:
            self.trouble = str(error) or type(error).__name__
            return None
        return connection

    def welcomed(self, connection: Connection) -> None:
        if self.connection is None:
            self.connection = connection
            self.connects += 1
            self._changed(+1)

    def _lost(self) -> None:
        if self.connection is not None:
            self.connection = None
            self._changed(-1)

    def ping(self, number: int) -> None:
        if self.connection is not None:
            self.connection.send({"t": "ping", "n": number})

    def hello(self) -> dict[str, Any]:
        return {
            "t": "hello", "v": 1, "role": "agent", "node": self.identity.node, "version": self.version,
            "digest": self.digest, "boot_id": BOOT_ID, "pid": 1, "started": self._started, "tx": "",
            "os": "linux", "arch": "x86_64", "python": "3.11", "features": [],
        }  # fmt: skip

    def result(self, job: dict[str, Any]) -> dict[str, Any]:
        """The selftest's reply, as docs/protocol.md defines it; to any other job, its own arguments."""
        self.jobs += 1
        if job["module"] != "selftest":
            reply = {"node": self.identity.node, "args": job.get("args", {})}
            return {"t": "result", "id": job["id"], "ok": True, "reply": reply, "seconds": 0.001}
        nonce = str(job.get("args", {}).get("nonce", ""))
        answer = hashlib.sha256(f"{nonce}:{self.digest}:{self.version}".encode()).hexdigest()
        reply = {"nonce": nonce, "answer": answer, "version": self.version, "digest": self.digest}
        return {"t": "result", "id": job["id"], "ok": True, "reply": reply}

    def status(self, command: dict[str, Any]) -> dict[str, Any]:
        """All that was to be restarted runs again, at once."""
        self.jobs += 1
        return {
            "t": "command-status", "id": command["id"], "type": command["type"], "status": "success",
            "origin": command.get("origin", ""), "modules": dict.fromkeys(command.get("modules", []), "running"),
            "asked": time.time(), "ended": time.time(),
        }  # fmt: skip
