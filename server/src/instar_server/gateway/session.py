"""One control channel: hello, then whatever its role is for.

A channel at rest costs its socket, one task that waits in `receive`, and this object: no timer of
its own. Whether it is alive is seen by one sweeper for all (`gateway.channels`).
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine
from typing import Any

import msgspec
from aiohttp import WSMsgType, web
from sqlalchemy.exc import SQLAlchemyError

from instar.core.errors import InstarError
from instar.wire.messages import (
    HELLO_WITHIN_S,
    NATIVE_FORCE,
    PROTOCOL,
    Ack,
    AgentUpdateDownloaded,
    AgentUpdateEnded,
    AgentUpdateProgress,
    CommandStatus,
    Error,
    Health,
    Hello,
    Job,
    Message,
    Output,
    Ping,
    Pong,
    Refused,
    Result,
    Taken,
    UpdateAck,
    UpdateHave,
    UpdateState,
    Welcome,
)  # fmt: skip
from instar_server import VERSION
from instar_server.domain import hello as hellos
from instar_server.gateway.frames import FrameError, decode, encode
from instar_server.gateway.hub import Hub
from instar_server.services.standing import Lapsed, Peer
from instar_server.storage.batch import AGENT, HEALTH, SEEN

log = logging.getLogger(__name__)

SEND_WITHIN_S = 10.0  # a node that does not read for so long is cut off
BULK_WITHIN_S = 90.0  # the same while blocks fill the line: one of them may take long on a slow one
MAX_HEALTH = 16_384  # bytes
NO_STAY_AWAY_S = 1.0
STORING = 32  # results of one node that are stored at a time; with the frame's limit, 8 MiB of them
FINAL = ("success", "failure", "timeout")
STATUSES = ("pending", "in-progress", *FINAL)
# Of a node whose certificate has run out; another role than these is refused.
LAPSED = {"beacon": Lapsed.SERVED, "rehearsal": Lapsed.WHILE_RECOVERED}
NOTHING: dict[str, str] = {}  # the same for all nodes without modules; never written to


class Session:
    __slots__ = (
        "_bulk", "_closing", "_hub", "_request", "_storing", "_ws", "address", "boot_id", "digest", "digests",
        "forced", "heard", "looked_at", "modules", "node", "not_after", "role", "serial", "since", "stored_at", "told",
        "told_gone", "tries", "tx", "version", "wake_port", "well",
    )  # fmt: skip

    def __init__(self, hub: Hub, ws: web.WebSocketResponse, request: web.Request, peer: Peer) -> None:
        self._hub, self._ws, self._request = hub, ws, request
        self._closing = self._bulk = False
        self.node, self.serial, self.not_after = peer.node, peer.serial, peer.not_after
        self.role = self.version = self.digest = self.tx = self.boot_id = ""
        self.well: bool | None = None
        self.forced = False
        self.since = self.heard = self.stored_at = hub.now()
        self.told, self.tries, self.looked_at = 0, 0, 0.0
        self.told_gone: frozenset[str] = frozenset()
        self.modules: dict[str, str] = NOTHING
        self.digests: dict[str, str] = NOTHING
        self.address, self.wake_port = (request.remote or "")[:64], 0
        self._storing: set[asyncio.Task[None]] | None = None

    # ---- life

    async def run(self) -> None:
        """Until the channel ends."""
        try:
            async with asyncio.timeout(HELLO_WITHIN_S):
                hello = await self._hello()
                if hello is not None:
                    await self._check(hello.role)
        except TimeoutError:
            await self.refuse("hello-expected", f"cannot wait longer than {HELLO_WITHIN_S:g} s for the hello")
            return
        except InstarError as error:
            away_s = NO_STAY_AWAY_S if error.code == "certificate-expired" else 60.0  # it renews first
            await self.refuse(error.code, error.text, away_s)
            return
        if hello is None:
            return
        self.role, self.version, self.digest, self.tx = hello.role, hello.version, hello.digest, hello.tx
        self.wake_port, self.boot_id = hello.wake_port, hello.boot_id
        self.forced = NATIVE_FORCE in hello.features
        if hello.role == "rehearsal":
            await self._rehearse(hello)
        elif hello.role == "beacon":
            await self._beacon(hello)
        else:
            await self._serve(hello)

    async def _hello(self) -> Hello | None:
        """The first usable hello. Raises InstarError when this node may not say it."""
        while (message := await self._next()) is not None:
            if isinstance(message, Hello):
                return hellos.check(message, self.node)
            await self.send(Error("hello-expected", f"cannot use {message.T!r} before the hello"))
        return None

    async def _check(self, role: str) -> None:
        """Raises Forbidden. What is served although its certificate has run out ends by itself, not by the sweeper."""
        await self._hub.standing.check(self.serial, self.node, LAPSED.get(role, Lapsed.REFUSED))
        if role in LAPSED and self._hub.now() >= self.not_after:
            self.not_after = math.inf

    async def _serve(self, hello: Hello) -> None:
        """Role agent: take the node's place, then answer until the channel ends."""
        hub = self._hub
        await hub.join(self, hello)
        try:
            # A revocation between the connection's check and the join would not have found this channel.
            await self._check("agent")
            values = (
                hello.version,
                hello.digest,
                hello.built,
                hello.boot_id,
                hello.os,
                hello.arch,
                hello.python,
                self.address,
                self.wake_port,
                self.heard,
            )
            hub.observations.put(AGENT, self.node, *values)
            await self.send(Welcome(PROTOCOL, VERSION, hub.settings.ping_s, hub.settings.health_s))
            hub.joined(self.node)
            hub.delivery.joined(self.node)
            if hello.tx:
                await self._health_job(hello)
            while (message := await self._next()) is not None:
                await self._dispatch(message)
        except InstarError as error:
            await self.refuse(error.code, error.text, 60.0)
        finally:
            hub.leave(self)

    async def _beacon(self, hello: Hello) -> None:
        """Role beacon: the node's launcher, which can take a recovery core and run it, and nothing else."""
        hub = self._hub
        hub.join_beacon(self)
        try:
            await self._check("beacon")
            hub.observations.put(SEEN, self.node, self.heard)
            await self.send(Welcome(PROTOCOL, VERSION, hub.settings.ping_s, hub.settings.health_s))
            hub.recoveries.beacon(self, hello)
            while (message := await self._next()) is not None:
                if isinstance(message, (Ping, Pong)):
                    await self._answer_ping(message)
                elif not self._heed(message):
                    await self.send(Error("unexpected-message", f"cannot use {message.T!r} of a beacon"))
        except InstarError as error:
            await self.refuse(error.code, error.text, 60.0)
        finally:
            hub.leave_beacon(self)

    async def _health_job(self, hello: Hello) -> None:
        """The job by which an agent on trial is judged."""
        deadline_s = self._hub.settings.job_s
        try:
            job = await self._hub.verdicts.begin(
                self.node, "health", hello.tx, hello.version, hello.digest, deadline_s
            )
        except SQLAlchemyError as error:
            log.error("cannot begin the health job of %s: %s", self.node, error)
            return
        if job is not None:
            await self.send(job)

    async def _rehearse(self, hello: Hello) -> None:
        """Role rehearsal: one job, its verdict, and the end. The node's state is not touched."""
        settings, verdicts = self._hub.settings, self._hub.verdicts
        try:
            await self.send(Welcome(PROTOCOL, VERSION, settings.ping_s, settings.health_s))
            job = await verdicts.begin(
                self.node, "rehearsal", hello.tx, hello.version, hello.digest, settings.job_s
            )
            if job is not None:
                await self.send(job)
                async with asyncio.timeout(settings.job_s):
                    if not await self._rehearsed(job):
                        return
        except TimeoutError:
            await verdicts.no_reply(self.node, hello.tx, hello.digest, settings.job_s)
        except SQLAlchemyError as error:
            log.error("cannot store the rehearsal of %s: %s", self.node, error)
            await self.refuse("not-stored", "cannot store the verdict; try again later", 5.0)
            return
        await self.refuse("rehearsal-over", "the rehearsal has ended; ask for the verdict")

    async def _rehearsed(self, job: Job) -> bool:
        """Wait for the job's result. False: the channel ended before."""
        while (message := await self._next()) is not None:
            if isinstance(message, Result) and message.id == job.id:
                await self._result(message)
                return True
            if isinstance(message, (Ping, Pong, Error, Health)):
                await self._answer_ping(message)
            else:
                await self.send(Error("unexpected-message", f"cannot use {message.T!r} in a rehearsal"))
        return False

    # ---- messages

    async def _dispatch(self, message: Message) -> None:
        try:
            if isinstance(message, Ping):  # by far the most frequent
                await self.send(Pong(message.n))
            elif isinstance(message, Output):
                self._hub.delivery.output(self.node, message)
            elif isinstance(message, Taken):
                self._hub.delivery.taken(self.node, message.id)
            elif isinstance(message, (Result, CommandStatus)):
                await self._store(message)
            elif isinstance(message, Health):
                await self._health(message)
            elif isinstance(message, Hello):
                await self.send(Error("unexpected-message", "cannot use a second hello"))
            else:
                self._heed(message)
        except SQLAlchemyError as error:
            await self._not_stored(message, error)

    def _heed(self, message: Message) -> bool:
        """What an agent and a beacon may both say. False: it is something else. What belongs to no transfer or
        recovery that is under way is passed over: it may have crossed the word that ended it."""
        if isinstance(message, (UpdateHave, UpdateAck, UpdateState)):
            self._hub.transfers.hear(self, message)
        elif isinstance(message, (AgentUpdateProgress, AgentUpdateDownloaded, AgentUpdateEnded)):
            self._hub.recoveries.hear(self, message)
        elif isinstance(message, Error):
            log.info("%s could not use a frame: %s %s", self.node, message.code[:64], message.message[:300])
        else:
            return False
        return True

    async def _not_stored(self, message: Message, error: Exception) -> None:
        log.error("cannot store a %s of %s: %s", message.T, self.node, error)
        await self.send(Error("not-stored", f"cannot store the {message.T}; send it again later"))

    async def _answer_ping(self, message: Message) -> None:
        if isinstance(message, Ping):
            await self.send(Pong(message.n))

    async def _store(self, message: Result | CommandStatus) -> None:
        """Store and acknowledge it, while the next messages are heard: after an absence many results come
        at once, and go into one transaction. Not more of them at a time than STORING."""
        storing = self._storing = self._storing if self._storing is not None else set()
        if len(storing) >= STORING:
            await asyncio.wait(storing, return_when=asyncio.FIRST_COMPLETED)
        work = self._result(message) if isinstance(message, Result) else self._status(message)
        task = asyncio.create_task(self._stored(message, work))
        storing.add(task)
        task.add_done_callback(storing.discard)

    async def _stored(self, message: Message, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except (SQLAlchemyError, InstarError) as error:
            await self._not_stored(message, error)

    async def _result(self, result: Result) -> None:
        """Acknowledged only when stored. A job that was never sent is named, and settled too:
        no later try could succeed, so the node must not keep it."""
        hub = self._hub
        ours = await hub.delivery.result(self.node, result) or await hub.verdicts.finish(self.node, result)
        if not ours:
            await self.send(
                Error("unknown-job", f"cannot use a result: no job {result.id[:40]!r} of this node")
            )
        await self.send(Ack(result.id))

    async def _status(self, status: CommandStatus) -> None:
        """As `_result`, for a command; one that is not final needs no answer."""
        if status.status not in STATUSES:
            text = f"cannot use a command's status: expected one of {', '.join(STATUSES)}"
            await self.send(Error("bad-status", text))
            return
        if not await self._hub.delivery.status(self.node, status):
            text = f"cannot use a status: no command {status.id[:40]!r} of this node"
            await self.send(Error("unknown-command", text))
        if status.status in FINAL:
            await self.send(Ack(status.id))

    async def _health(self, health: Health) -> None:
        whole = {"modules": health.modules, "facts": health.facts, "digests": health.digests}
        body = msgspec.json.encode(whole)
        if len(body) > MAX_HEALTH:
            raise_text = f"cannot keep the health: expected at most {MAX_HEALTH} bytes, got {len(body)}"
            await self.send(Error("health-too-large", raise_text))
            return
        self.modules, self.digests = health.modules or NOTHING, health.digests or NOTHING
        self.well = health.ok
        self._hub.healthy(self)
        values = (int(health.ok), body.decode(), self.heard, self.heard)
        self._hub.observations.put(HEALTH, self.node, *values)

    # ---- frames

    async def _next(self) -> Message | None:
        """The next message that can be used; None when the channel has ended."""
        while True:
            frame = await self._ws.receive()
            if frame.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                return None
            self.heard = self._hub.now()
            try:
                if frame.type is WSMsgType.BINARY:
                    raise FrameError("bad-frame", "cannot read a binary frame: expected text")
                data: bytes = frame.data
                return decode(data)
            except FrameError as error:
                await self.send(Error(error.code, error.text))

    async def send(self, message: Message) -> bool:
        """False: it did not go out. A node that does not read is cut off."""
        if self._ws.closed or self._closing:
            return False
        return await self._put(encode(message))

    async def send_frame(self, frame: str) -> bool:
        """The same for a message that is a frame already."""
        return not (self._ws.closed or self._closing) and await self._put(frame)

    async def send_bulk(self, frame: str) -> bool:
        """The same for a large frame, which waits until the socket has room. Must not be cancelled: all who wait
        for one socket wait for one thing."""
        if self._ws.closed or self._closing:
            return False
        self._bulk = True
        try:
            await self._ws.send_str(frame)
        except (ConnectionError, RuntimeError):
            self.abort()
            return False
        finally:
            self._bulk = False
        return True

    async def _put(self, frame: str) -> bool:
        try:
            if not self._request.protocol.writing_paused:
                # The usual way, without a timer: it does not wait, and if it ever does, the sweeper ends it.
                await self._ws.send_str(frame)
            else:
                async with asyncio.timeout(BULK_WITHIN_S if self._bulk else SEND_WITHIN_S):
                    await self._ws.send_str(frame)
        except (TimeoutError, ConnectionError, RuntimeError):
            # RuntimeError: aiohttp's word for a channel that closed in between.
            self.abort()
            return False
        return True

    async def refuse(self, code: str, text: str, retry_after_s: float = NO_STAY_AWAY_S) -> None:
        """Say why, and end the channel. Bounded; a second call does nothing."""
        if self._closing or self._ws.closed:
            return
        self._closing = True
        if await self._put(encode(Refused(code, text, retry_after_s))):
            await self._ws.close(code=1000, message=code.encode())

    def abort(self) -> None:
        """Cut the connection without a word."""
        transport = self._request.transport
        if transport is not None:
            transport.abort()
