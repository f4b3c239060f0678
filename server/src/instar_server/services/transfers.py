"""Parcels on their way through control channels: who is next, and what came of it.

At most one transfer of a node and MOST_AT_ONCE of each kind are under way; the rest wait in the order in which they
were asked for. What operators ask for is one kind, what beacons need another, all else the third: slow nodes keep
none but their own kind waiting. A transfer of a wish that failed is tried again after a rest, while the wish stands.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from instar.wire.messages import UpdateAck, UpdateHave, UpdateState
from instar_server.bus.api import AGENTS, Bus
from instar_server.domain import transfers as rules
from instar_server.domain.looks import SendTo
from instar_server.domain.transfers import Rest, State
from instar_server.domain.wanted import LINES, NATIVE, PULL, RECOVERY, Wish
from instar_server.services.history import History, server_entry
from instar_server.services.presence import Channel
from instar_server.services.sending import CUT, DROPPED, Ended, Request, Sending, Tools

log = logging.getLogger(__name__)

WISH, FORCE, TROUBLE = "wish", "force", "trouble"  # causes
OPERATOR, BEACON = "operator", "beacon"
TROUBLE_S = 900.0  # how long a node's word counts that it cannot reach the artifacts


class Transfers:
    """`held` says which nodes are sent no wish's parcel now, since something else goes on there. `close` at the
    end."""

    def __init__(self, tools: Tools, history: History, bus: Bus) -> None:
        self._tools, self._history, self._bus = tools, history, bus
        self._now, self._chance, self._board = tools.now, tools.chance, tools.board
        self._waiting: dict[str, Request] = {}  # by node, in the order of asking
        self._running: dict[str, Sending] = {}
        self._rests: dict[tuple[str, str], Rest] = {}  # by node and line
        self._trouble: dict[str, float] = {}  # nodes that cannot reach the artifacts, and when they said so
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.held: Callable[[str], bool] = lambda _node: False

    # ---- what is wanted

    def wanted(self, want: SendTo) -> None:
        """What a connected node lacks of its wishes and should be sent, the first one first; nothing else is."""
        native = [wish for wish in want.wishes if wish.via != RECOVERY]
        self._stop_outdated(want.node, [*native, *want.again])
        if not (want.wishes or want.again):
            for line in LINES:
                self._rests.pop((want.node, line), None)
        running = self._running.get(want.node)
        busy = want.node in self._waiting or (running is not None and not running.why)
        if want.at_work or busy or self.held(want.node):
            return
        if native:
            self._offer(want.node, native[0], TROUBLE if native[0].via == PULL else WISH)
        elif again := [wish for wish in want.again if not self._rests_still(want.node, wish)]:
            self._offer(want.node, again[0], FORCE)

    def _rests_still(self, node: str, wish: Wish) -> bool:
        rest = self._rests.get((node, wish.line))
        return rest is not None and not rest.over(wish.generation, self._now())

    def _offer(self, node: str, wish: Wish, cause: str) -> None:
        if self._rests_still(node, wish):
            return
        view = self._board.begin(
            node, line=wish.line, via=NATIVE, cause=cause, version=wish.version, digest=wish.digest,
            state="queued",
        )  # fmt: skip
        request = Request(
            node,
            wish.line,
            wish.version,
            wish.digest,
            wish.target,
            cause,
            view,
            wish.generation,
            self._offered,
        )
        if cause == TROUBLE:
            self._start(self._note_trouble(request))
        self.ask(request)

    def _stop_outdated(self, node: str, wishes: list[Wish]) -> None:
        """End a transfer of what is not wanted any more."""
        still = {(wish.line, wish.digest) for wish in wishes}
        waiting, running = self._waiting.get(node), self._running.get(node)
        if waiting is not None and _outdated(waiting, still):
            self._drop(node)
        if running is not None and _outdated(running.request, still):
            running.stop(DROPPED)

    def trouble(self, node: str) -> None:
        """The node has said that it cannot reach the artifacts: what it wants to fetch is sent to it."""
        self._trouble[node] = self._now()

    def in_trouble(self, node: str) -> bool:
        """Whether it said so lately, or is being sent something for it."""
        running = self._running.get(node)
        if running is not None and running.request.cause == TROUBLE:
            return True
        at = self._trouble.get(node)
        if at is not None and self._now() - at > TROUBLE_S:
            del self._trouble[node]
            return False
        return at is not None

    # ---- one after the other

    def ask(self, request: Request) -> bool:
        """Send it when its turn has come. False: something waits for this node already, or the server stops.

        What an operator or a beacon asks for takes the place of the node's wish.
        """
        node = request.node
        if self._closed:
            return False
        if request.cause in (OPERATOR, BEACON):
            self.cancel(node)
        if node in self._waiting:
            return False
        self._waiting[node] = request
        self._next((node,))
        return True

    def cancel(self, node: str) -> None:
        """Nothing more of what is under way or waits for this node."""
        self._drop(node)
        running = self._running.get(node)
        if running is not None:
            running.stop(DROPPED)

    def _drop(self, node: str) -> None:
        request = self._waiting.pop(node, None)
        if request is not None:
            self._tell(request, Ended(DROPPED))

    def _next(self, nodes: Iterable[str]) -> None:
        """Begin what waits for these nodes, as far as there are places."""
        places = Counter(_kind(sending.request) for sending in self._running.values())
        for node in nodes:
            kind = _kind(self._waiting[node])
            if node in self._running or places[kind] >= rules.MOST_AT_ONCE:
                continue
            places[kind] += 1
            sending = self._running[node] = Sending(self._waiting.pop(node), self._tools)
            self._start(self._run(sending))

    async def _run(self, sending: Sending) -> None:
        ended = Ended(CUT)
        try:
            ended = await sending.run()
        finally:
            del self._running[sending.request.node]
            if not self._closed:
                self._tell(sending.request, ended)
                self._next(tuple(self._waiting))

    def _tell(self, request: Request, ended: Ended) -> None:
        if request.line != rules.RECOVERY:  # a recovery shows its core's way as a part of its own
            self._board.note(request.view, ended=True, state=ended.how, code=ended.code, text=ended.text)
        if request.done is not None:
            request.done(request, ended)

    # ---- what nodes say

    def hear(self, channel: Channel, message: UpdateHave | UpdateAck | UpdateState) -> bool:
        """False: nothing of that id is under way on this channel."""
        running = self._running.get(channel.node)
        return running is not None and running.hear(channel, message)

    def left(self, channel: Channel) -> None:
        """The channel has ended, or another has taken its place."""
        running = self._running.get(channel.node)
        if running is not None and running.goes_through(channel):
            running.stop(CUT)

    def joined(self, node: str) -> None:
        """The node has come again, perhaps with other settings: what it declined, or ran, is offered anew."""
        for line in LINES:
            rest = self._rests.get((node, line))
            if rest is not None and rest.idle:
                del self._rests[node, line]

    # ---- what came of a wish's

    def _offered(self, request: Request, ended: Ended) -> None:
        how = "moved" if ended.how == CUT and ended.moved else ended.how
        key = (request.node, request.line)
        if how != DROPPED:
            spread = int(self._chance(2), 16) / 65_536
            rest = rules.rest(self._rests.get(key), request.generation, how, self._now(), spread)
            settled = request.cause == FORCE and how == State.NOT_NEEDED.value  # it was forced for this wish
            self._rests[key] = replace(rest, until=math.inf) if settled else rest
        if ended.how == State.RECEIVED.value:
            reason = f"{request.line} {request.version} is here"
            self._bus.publish(AGENTS, {"do": "look", "node": request.node, "reason": reason})
        elif ended.how == State.DECLINED.value:
            self._start(self._note_declined(request, ended))

    async def _note_declined(self, request: Request, ended: Ended) -> None:
        text = f"{request.line} {request.version} was not sent: {ended.text}"
        await self._note(request, "declined", "never", text)

    async def _note_trouble(self, request: Request) -> None:
        text = f"it cannot reach the artifacts: {request.line} {request.version} is sent through its channel"
        await self._note(request, "artifacts-unreachable", "artifacts-unreachable", text)

    async def _note(self, request: Request, phase: str, code: str, text: str) -> None:
        """Once for each generation of a wish."""
        entry = server_entry(
            f"{phase}:{request.line}:{request.generation}", phase, self._now(), code, text, request.line,
            request.version, request.digest,
        )  # fmt: skip
        try:
            await self._history.note(request.node, entry)
        except SQLAlchemyError as error:
            log.error("cannot store what happened to %s: %s", request.node, error)

    # ---- tasks

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop sending; nodes keep what they have, and go on from there."""
        self._closed = True
        self._waiting.clear()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _outdated(request: Request, still: set[tuple[str, str]]) -> bool:
    mine = request.cause in (WISH, FORCE, TROUBLE) and request.line != rules.RECOVERY
    return mine and (request.line, request.digest) not in still


def _kind(request: Request) -> str:
    return request.cause if request.cause in (OPERATOR, BEACON) else WISH
