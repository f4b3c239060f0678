"""Parcels on their way through control channels: who is next, one task each, and what came of it.

At most one transfer of a node and MOST_AT_ONCE of this server are under way; the rest wait in the order in which
they were asked for. A block is read from the parcel's file when it is its turn, and sent when the
socket has room: a transfer holds one block at a time, and no other channel waits for it.
"""

from __future__ import annotations

import asyncio
import binascii
import logging
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from instar.core.errors import InstarError
from instar.wire.messages import UpdateAck, UpdateBlock, UpdateEnd, UpdateHave, UpdateOffer, UpdateState
from instar_server.bus.api import AGENTS, Bus
from instar_server.domain import transfers as rules
from instar_server.domain.looks import SendTo
from instar_server.domain.transfers import End, Rest, Send, State, Transfer, Wait
from instar_server.domain.wanted import LINES, NATIVE, PULL, RECOVERY, Wish
from instar_server.services.history import History, server_entry
from instar_server.services.parcels import Parcel, Parcels
from instar_server.services.ports import Chance, Now
from instar_server.services.presence import Channel, Presence
from instar_server.services.progress import Board, View

log = logging.getLogger(__name__)

WISH, TROUBLE, OPERATOR, BEACON = "wish", "trouble", "operator", "beacon"  # causes
CUT, DROPPED = "cut", "dropped"  # how a transfer ends that has no state of its own for it
CALL_OFF_S = 5.0  # for a node's answer when nothing more comes
TROUBLE_S = 900.0  # how long a node's word counts that it cannot reach the artifacts
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Terms:
    """The most that is offered: bytes of a block, blocks under way, bytes a second (0: no cap)."""

    block: int = 65_536
    window: int = 16
    rate: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """Send `target` to a node. `done` is told once how it ended: a State's value, `cut` or `dropped`, with
    a code and a text, and the SHA-384 of the parcel ('' when there was none)."""

    node: str
    line: str
    version: str
    digest: str
    target: str
    cause: str
    view: View
    generation: int = 0
    done: Callable[[Request, Ended], None] | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    how: str
    code: str = ""
    text: str = ""
    parcel: str = ""
    moved: bool = False  # it came further than it was


class _Gone(Exception):
    """The channel has ended."""


@dataclass(slots=True)
class _Running:
    request: Request
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    pump: asyncio.Task[Ended] | None = None
    channel: Channel | None = None
    transfer: Transfer | None = None
    parcel: Parcel | None = None
    why: str = ""  # how it ends, once it is to be stopped


class Transfers:
    """`held` says which nodes are sent no wish's parcel now, since something else goes on there. `close` at the
    end."""

    def __init__(
        self,
        parcels: Parcels,
        presence: Presence,
        history: History,
        board: Board,
        bus: Bus,
        terms: Terms,
        now: Now,
        chance: Chance,
    ) -> None:
        self._parcels, self._presence, self._history, self._board = parcels, presence, history, board
        self._bus, self._terms, self._now, self._chance = bus, terms, now, chance
        self._waiting: dict[str, Request] = {}  # by node, in the order of asking
        self._running: dict[str, _Running] = {}
        self._rests: dict[tuple[str, str], Rest] = {}  # by node and line
        self._trouble: dict[str, float] = {}  # nodes that cannot reach the artifacts, and when they said so
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.held: Callable[[str], bool] = lambda _node: False

    # ---- what is wanted

    def wanted(self, want: SendTo) -> None:
        """What a connected node lacks of its wishes and should be sent, the first one first; nothing else is."""
        native = [wish for wish in want.wishes if wish.via != RECOVERY]
        self._stop_outdated(want.node, native)
        if not want.wishes:
            for line in LINES:
                self._rests.pop((want.node, line), None)
        running = self._running.get(want.node)
        busy = want.node in self._waiting or (running is not None and not running.why)
        if not native or want.at_work or busy or self.held(want.node):
            return
        wish = native[0]
        rest = self._rests.get((want.node, wish.line))
        if rest is not None and not rest.over(wish.generation, self._now()):
            return
        cause = TROUBLE if wish.via == PULL else WISH
        view = self._board.begin(
            want.node, line=wish.line, via=NATIVE, cause=cause, version=wish.version, digest=wish.digest,
            state="queued",
        )  # fmt: skip
        request = Request(
            want.node, wish.line, wish.version, wish.digest, wish.target, cause, view, wish.generation,
            self._offered,
        )  # fmt: skip
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
            self._stop(running, DROPPED)

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

        What an operator or a beacon asks for goes before a wish.
        """
        node = request.node
        if self._closed:
            return False
        if request.cause in (OPERATOR, BEACON):
            self._drop(node)
            running = self._running.get(node)
            if running is not None:
                self._stop(running, DROPPED)
        if node in self._waiting:
            return False
        self._waiting[node] = request
        self._next()
        return True

    def cancel(self, node: str) -> None:
        """Nothing more of what is under way or waits for this node."""
        self._drop(node)
        running = self._running.get(node)
        if running is not None:
            self._stop(running, DROPPED)

    def _drop(self, node: str) -> None:
        request = self._waiting.pop(node, None)
        if request is not None:
            self._tell(request, Ended(DROPPED))

    def _next(self) -> None:
        free = rules.MOST_AT_ONCE - len(self._running)
        for node in [node for node in self._waiting if node not in self._running][: max(0, free)]:
            running = self._running[node] = _Running(self._waiting.pop(node))
            self._start(self._run(running))

    async def _run(self, running: _Running) -> None:
        request = running.request
        ended = Ended(CUT)
        try:
            running.pump = asyncio.create_task(self._send(running))
            if running.why:  # it was stopped before it began
                running.pump.cancel()
            await asyncio.wait({running.pump})
            if running.pump.cancelled():
                await self._call_off(running)
                ended = Ended(running.why or CUT, moved=_moved(running.transfer))
            else:
                ended = running.pump.result()
        except InstarError as error:
            ended = Ended(State.FAILED.value, error.code, error.text)
        except OSError as error:
            ended = Ended(State.FAILED.value, "disk-failed", f"cannot read the parcel: {error}")
        finally:
            if running.pump is not None:
                running.pump.cancel()
            del self._running[request.node]
            if not self._closed:
                self._tell(request, ended)
                self._next()

    async def _call_off(self, running: _Running) -> None:
        """Of one that was dropped, tell the node that nothing more comes: else it would be busy with it for as
        long as it waits for blocks. An end before the last block makes it forget what it has."""
        transfer, channel = running.transfer, running.channel
        if running.why != DROPPED or transfer is None or channel is None:
            return
        if transfer.state is not State.CHECKING:
            await channel.send(UpdateEnd(transfer.offer.id, transfer.offer.sha384))
        until = self._now() + CALL_OFF_S
        while transfer.state not in rules.FINAL and self._now() < until and running.why == DROPPED:
            running.wake.clear()
            await _until(running.wake, until - self._now())

    def _tell(self, request: Request, ended: Ended) -> None:
        if request.line != rules.RECOVERY:  # a recovery shows its core's way as a part of its own
            self._board.note(request.view, ended=True, state=ended.how, code=ended.code, text=ended.text)
        if request.done is not None:
            request.done(request, ended)

    # ---- one transfer

    async def _send(self, running: _Running) -> Ended:
        """Raises InstarError, OSError."""
        request = running.request
        parcel = running.parcel = await asyncio.to_thread(self._parcels.parcel_of, request.target)
        with await asyncio.to_thread(parcel.path.open, "rb", 0) as file:
            return await self._converse(running, parcel, file)

    async def _converse(self, running: _Running, parcel: Parcel, file: BinaryIO) -> Ended:
        request, terms = running.request, self._terms
        channel = running.channel = self._presence.channel(request.node)
        if channel is None:
            return Ended(CUT)
        offer = UpdateOffer(
            f"u-{self._chance(12)}", request.line, parcel.version, parcel.digest, parcel.target, parcel.length,
            parcel.sha384, terms.block, terms.window, terms.rate,
        )  # fmt: skip
        transfer = running.transfer = Transfer(offer, self._now())
        self._show(running)
        try:
            if not await channel.send(offer):
                raise _Gone
            await self._pump(running, channel, transfer, file)
        except _Gone:
            return Ended(CUT, moved=_moved(transfer))
        if transfer.state is State.FAILED and transfer.code == "altered-parcel":
            await asyncio.to_thread(self._parcels.forget, parcel)
        return Ended(transfer.state.value, transfer.code, transfer.text, parcel.sha384, _moved(transfer))

    async def _pump(self, running: _Running, channel: Channel, transfer: Transfer, file: BinaryIO) -> None:
        """Until it has ended. Raises _Gone."""
        offer = transfer.offer
        while True:
            running.wake.clear()
            step = transfer.next(self._now())
            self._show(running)
            match step:
                case Send(n, start, size):
                    frame = await asyncio.to_thread(_block_frame, file, offer.id, n, start, size)
                    await self._put(channel, frame)
                case End():
                    if not await channel.send(UpdateEnd(offer.id, offer.sha384)):
                        raise _Gone
                case Wait(until):
                    await _until(running.wake, until - self._now())
                case _:
                    return

    async def _put(self, channel: Channel, frame: str) -> None:
        """Send a block when the socket has room for it. Raises _Gone.

        In a task of its own: several senders wait for one socket in one place, and a sender that was
        cancelled there would take the others with it.
        """
        sending = asyncio.create_task(channel.send_bulk(frame))
        await asyncio.wait({sending}, timeout=rules.ACK_S)
        if not sending.done():
            sending.add_done_callback(_seen)
            raise _Gone  # it reads nothing: its channel ends by the rules for all
        if sending.cancelled() or not sending.result():
            raise _Gone

    def _show(self, running: _Running) -> None:
        transfer, request = running.transfer, running.request
        if transfer is None:
            return
        offer = transfer.offer
        shown: dict[str, Any] = {
            "id": offer.id, "state": transfer.state.value, "length": offer.length, "block": transfer.block,
            "window": transfer.window, "blocks": transfer.acked, "of_blocks": transfer.blocks,
            "bytes": transfer.bytes, "rate": transfer.pace(self._now()),
            "percent": round(100 * transfer.bytes / offer.length, 1),
        }  # fmt: skip
        if request.line == rules.RECOVERY:
            shown |= {"state": "sending", "phase": "core"}
        self._board.note(request.view, **shown)

    # ---- what nodes say

    def hear(self, channel: Channel, message: UpdateHave | UpdateAck | UpdateState) -> bool:
        """False: nothing of that id is under way on this channel."""
        running = self._running.get(channel.node)
        if running is None or running.channel is not channel or running.transfer is None:
            return False
        transfer = running.transfer
        if message.id != transfer.offer.id:
            return False
        now = self._now()
        if isinstance(message, UpdateHave):
            transfer.have(message, now)
        elif isinstance(message, UpdateAck):
            transfer.ack(message.n, now)
        else:
            transfer.word(message, now)
        running.wake.set()
        return True

    def left(self, channel: Channel) -> None:
        """The channel has ended, or another has taken its place."""
        running = self._running.get(channel.node)
        if running is not None and running.channel is channel:
            self._stop(running, CUT)

    @staticmethod
    def _stop(running: _Running, why: str) -> None:
        if running.transfer is not None and running.transfer.state in rules.FINAL:
            return  # it has ended by itself, and is about to say so
        running.why = why
        running.wake.set()
        if running.pump is not None:
            running.pump.cancel()

    # ---- what came of a wish's

    def _offered(self, request: Request, ended: Ended) -> None:
        how = "moved" if ended.how == CUT and ended.moved else ended.how
        key = (request.node, request.line)
        if how != DROPPED:
            spread = int(self._chance(2), 16) / 65_536
            self._rests[key] = rules.rest(self._rests.get(key), request.generation, how, self._now(), spread)
        if ended.how == State.RECEIVED.value:
            reason = f"{request.line} {request.version} is here"
            self._bus.publish(AGENTS, {"do": "look", "node": request.node, "reason": reason})
        elif ended.how == State.DECLINED.value:
            self._start(self._note_declined(request, ended))

    def joined(self, node: str) -> None:
        """The node has come again: what it declined, or had, is offered anew."""
        for line in LINES:
            rest = self._rests.get((node, line))
            if rest is not None and rest.spare:
                del self._rests[node, line]

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
    mine = request.cause in (WISH, TROUBLE) and request.line != rules.RECOVERY
    return mine and (request.line, request.digest) not in still


def _moved(transfer: Transfer | None) -> bool:
    return transfer is not None and transfer.acked > transfer.resumed


def _block_frame(file: BinaryIO, id_: str, n: int, start: int, size: int) -> str:
    """Runs in a thread. Raises OSError when the parcel has become shorter."""
    data = os.pread(file.fileno(), size, start)
    if len(data) != size:
        raise OSError(f"expected {size} bytes from byte {start} on, got {len(data)}")
    block = {"t": UpdateBlock.T, "id": id_, "n": n, "data": binascii.b2a_base64(data, newline=False).decode()}
    return _encode(block).decode()


async def _until(wake: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            await wake.wait()
    except TimeoutError:
        return


def _seen(task: asyncio.Task[bool]) -> None:
    if not task.cancelled():
        task.exception()
