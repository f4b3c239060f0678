"""All control channels of this process: who is there, orders to them, and the one sweeper for all."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import web

from instar.wire.messages import MAX_FRAME, Hello, Look
from instar_server.bus.api import AGENTS, FLEET, Bus, Message, health_topic
from instar_server.gateway.hub import ChannelSettings
from instar_server.gateway.identity import peer
from instar_server.gateway.session import Session
from instar_server.services.delivery import Delivery
from instar_server.services.presence import Channel, Live, Presence
from instar_server.services.recoveries import Recovering
from instar_server.services.standing import Standing
from instar_server.services.transfers import Transfers
from instar_server.services.verdicts import Verdicts
from instar_server.storage.batch import SEEN, Observations

SWEEP_S = 5.0
SILENT_PINGS = 2.5  # so many ping intervals without a frame mean that the node is gone
STORE_SEEN_S = 60.0  # how often a quiet node's 'last seen' is written
CLOSE_WITHIN_S = 2.0  # for the other side's close frame
# A little above the frame limit, so that a frame just over it gets an error and the channel stays;
# one above this ends the channel, since reading it would let anyone fill the memory.
MAX_READ = 2 * MAX_FRAME


class Channels:
    """Is the sessions' `Hub`."""

    def __init__(
        self,
        settings: ChannelSettings,
        standing: Standing,
        verdicts: Verdicts,
        delivery: Delivery,
        transfers: Transfers,
        recoveries: Recovering,
        presence: Presence,
        observations: Observations,
        bus: Bus,
        joined: Callable[[str], None],
        now: Callable[[], float],
    ) -> None:
        self.settings, self.standing, self.verdicts, self.delivery = settings, standing, verdicts, delivery
        self.transfers, self.recoveries = transfers, recoveries
        self.observations, self.joined, self.now = observations, joined, now
        self._presence, self._bus = presence, bus
        self._sessions: set[Session] = set()
        self._tasks: set[asyncio.Task[object]] = set()
        self._stopping = False
        self._subscription = bus.subscribe(AGENTS, self._order)

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/channel", self.open)]

    async def open(self, request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(
            timeout=CLOSE_WITHIN_S, compress=False, max_msg_size=MAX_READ, autoping=True, decode_text=False
        )
        session = Session(self, ws, request, peer(request))
        await ws.prepare(request)
        self._sessions.add(session)
        try:
            if self._stopping:
                await session.refuse("server-stopping", "the server is stopping", self._stay_away())
            else:
                await session.run()
        finally:
            self._sessions.discard(session)
        return ws

    async def join(self, live: Live, hello: Hello) -> None:
        self._replaced(self._presence.join(live))
        beacon = self._presence.beacon(live.node)
        if beacon is not None:
            self._replaced(beacon)
            self.leave_beacon(beacon)
        body = {"kind": "connected", "node": live.node, "version": live.version, "digest": live.digest}
        said = {"built": hello.built, "os": hello.os, "arch": hello.arch, "python": hello.python}
        self._bus.publish(FLEET, {**body, **said, "since": live.since})

    def healthy(self, live: Live) -> None:
        self._bus.publish(health_topic(live.node), {"node": live.node})

    def join_beacon(self, beacon: Channel) -> None:
        for replaced in self._presence.join_beacon(beacon):
            self._replaced(replaced)
        self._bus.publish(FLEET, {"kind": "beacon", "node": beacon.node})

    def _replaced(self, channel: Channel | None) -> None:
        if channel is not None:
            self.transfers.left(channel)
        if isinstance(channel, Session):
            text = "another channel of this node has taken the place of this one"
            self._start(channel.refuse("replaced", text))

    def leave_beacon(self, beacon: Channel) -> None:
        self.transfers.left(beacon)
        if self._presence.leave_beacon(beacon):
            self.recoveries.beacon_left(beacon)
            self.observations.put(SEEN, beacon.node, self.now())
            self._bus.publish(FLEET, {"kind": "disconnected", "node": beacon.node})

    def leave(self, live: Live) -> None:
        self.transfers.left(live)
        if self._presence.leave(live):
            self.observations.put(SEEN, live.node, live.heard)
            self._bus.publish(FLEET, {"kind": "disconnected", "node": live.node})

    def count(self) -> int:
        return len(self._sessions)

    # ---- orders from the bus

    def _order(self, message: Message) -> None:
        body = message.body
        if body["do"] == "look":
            live = self._presence.get(body["node"])
            if isinstance(live, Session):
                self._start(self._look(live, str(body["reason"])))
        elif body["do"] == "send":
            live = self._presence.get(body["node"])
            if isinstance(live, Session):
                self._start(live.send_frame(body["frame"]))
        elif body["do"] == "revoke":
            for session in self._sessions:
                if session.node == body["node"] and body["serial"] in (None, session.serial):
                    self._start(session.refuse("revoked", "this node or its certificate was revoked", 3600.0))

    async def _look(self, session: Session, reason: str) -> None:
        await session.send(Look(reason))

    def _start(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- sweeping and stopping

    async def sweep(self) -> None:
        """Until cancelled: end channels that are silent or whose certificate has run out."""
        while True:
            await asyncio.sleep(min(SWEEP_S, self.settings.ping_s))
            now = self.now()
            for session in tuple(self._sessions):
                if now - session.heard > SILENT_PINGS * self.settings.ping_s:
                    session.abort()
                elif now >= session.not_after:
                    self._start(
                        session.refuse("certificate-expired", "this channel's certificate has run out")
                    )
                elif now - session.stored_at > STORE_SEEN_S and session.role in ("agent", "beacon"):
                    session.stored_at = now
                    self.observations.put(SEEN, session.node, session.heard)

    async def stop(self, within_s: float) -> None:
        """Tell every node that the server stops, each to come back at its own time, and end the channels."""
        self._stopping = True
        for session in tuple(self._sessions):
            self._start(session.refuse("server-stopping", "the server is stopping", self._stay_away()))
        if self._tasks:
            await asyncio.wait(tuple(self._tasks), timeout=within_s)
        for session in tuple(self._sessions):
            session.abort()
        self._subscription.close()

    def _stay_away(self) -> float:
        """Spread: about 500 nodes a second come back to one core without a queue."""
        return 1.0 + random.random() * min(60.0, max(1.0, len(self._sessions) / 300))
