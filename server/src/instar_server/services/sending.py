"""One parcel's way to one node: the machine of `domain.transfers`, driven over a channel.

A block is read from the parcel's file when it is its turn, and sent when the socket has room: one block is held
at a time, and no other channel waits for it.
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec

from instar.core.errors import InstarError
from instar.wire.messages import UpdateAck, UpdateBlock, UpdateEnd, UpdateHave, UpdateOffer, UpdateState
from instar_server.domain import transfers as rules
from instar_server.domain.transfers import End, Send, State, Transfer, Wait
from instar_server.services.parcels import Parcel, Parcels
from instar_server.services.ports import Chance, Now
from instar_server.services.presence import Channel, Presence
from instar_server.services.progress import Board, View

CUT, DROPPED = "cut", "dropped"  # how a transfer ends that has no state of its own for it
CALL_OFF_S = 5.0  # for a node's answer when nothing more comes
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Terms:
    """The most that is offered: bytes of a block, blocks under way, bytes a second (0: no cap)."""

    block: int = 65_536
    window: int = 16
    rate: int = 0


@dataclass(frozen=True, slots=True)
class Tools:
    """What every transfer works with."""

    parcels: Parcels
    presence: Presence
    board: Board
    terms: Terms
    now: Now
    chance: Chance


@dataclass(frozen=True, slots=True)
class Request:
    """Send `target` to a node. `done` is told once how that ended."""

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
    """`how`: a State's value, `cut` or `dropped`. `parcel` is its SHA-384, '' when there was none; `moved`: the
    node has more of it than it had before."""

    how: str
    code: str = ""
    text: str = ""
    parcel: str = ""
    moved: bool = False


class _Gone(Exception):
    """The channel has ended."""


class Sending:
    """`run` it once; `stop` ends it early."""

    def __init__(self, request: Request, tools: Tools) -> None:
        self.request, self._tools = request, tools
        self.why = ""  # how it ends, once it was stopped
        self._wake = asyncio.Event()
        self._work: asyncio.Task[Ended] | None = None
        self._channel: Channel | None = None
        self._transfer: Transfer | None = None

    async def run(self) -> Ended:
        """Until it has ended, however that may be."""
        self._work = asyncio.create_task(self._send())
        if self.why:  # it was stopped before it began
            self._work.cancel()
        try:
            await asyncio.wait({self._work})
            if self._work.cancelled():
                await self._call_off()
                return Ended(self.why or CUT, moved=self._moved)
            return self._work.result()
        except InstarError as error:
            return Ended(State.FAILED.value, error.code, error.text)
        except OSError as error:
            return Ended(State.FAILED.value, "disk-failed", f"cannot read the parcel: {error}")
        finally:
            self._work.cancel()

    def stop(self, why: str) -> None:
        if self._transfer is not None and self._transfer.state in rules.FINAL:
            return  # it has ended by itself, and is about to say so
        self.why = why
        self._wake.set()
        if self._work is not None:
            self._work.cancel()

    def goes_through(self, channel: Channel) -> bool:
        return self._channel is channel

    def hear(self, channel: Channel, message: UpdateHave | UpdateAck | UpdateState) -> bool:
        """False: it is about another one, or came through another channel."""
        transfer = self._transfer
        if transfer is None or self._channel is not channel or message.id != transfer.offer.id:
            return False
        now = self._tools.now()
        if isinstance(message, UpdateHave):
            transfer.have(message, now)
        elif isinstance(message, UpdateAck):
            transfer.ack(message.n, now)
        else:
            transfer.word(message, now)
        self._wake.set()
        return True

    # ---- inside

    @property
    def _moved(self) -> bool:
        return self._transfer is not None and self._transfer.acked > self._transfer.resumed

    async def _send(self) -> Ended:
        """Raises InstarError, OSError."""
        parcel = await self._tools.parcels.parcel_of(self.request.target)
        with await asyncio.to_thread(parcel.path.open, "rb", 0) as file:
            return await self._converse(parcel, file)

    async def _converse(self, parcel: Parcel, file: BinaryIO) -> Ended:
        tools, terms = self._tools, self._tools.terms
        channel = self._channel = tools.presence.channel(self.request.node)
        if channel is None:
            return Ended(CUT)
        offer = UpdateOffer(
            f"u-{tools.chance(12)}", self.request.line, parcel.version, parcel.digest, parcel.target,
            parcel.length, parcel.sha384, terms.block, terms.window, terms.rate, self.request.generation,
        )  # fmt: skip
        transfer = self._transfer = Transfer(offer, tools.now())
        self._show(transfer)
        try:
            if not await channel.send(offer):
                raise _Gone
            await self._pump(channel, transfer, file)
        except _Gone:
            return Ended(CUT, moved=self._moved)
        if transfer.state is State.FAILED and transfer.code == "altered-parcel":
            with contextlib.suppress(InstarError):  # not looked at now: it is when a node says so again
                await tools.parcels.doubt(parcel)
        return Ended(transfer.state.value, transfer.code, transfer.text, parcel.sha384, self._moved)

    async def _pump(self, channel: Channel, transfer: Transfer, file: BinaryIO) -> None:
        """Until the transfer has ended. Raises _Gone."""
        offer, now = transfer.offer, self._tools.now
        while True:
            self._wake.clear()
            step = transfer.next(now())
            self._show(transfer)
            match step:
                case Send(n, start, size):
                    await _put(channel, await asyncio.to_thread(_block_frame, file, offer.id, n, start, size))
                case End():
                    if not await channel.send(UpdateEnd(offer.id, offer.sha384)):
                        raise _Gone
                case Wait(until):
                    await _until(self._wake, until - now())
                case _:
                    return

    async def _call_off(self) -> None:
        """Of one that was dropped, tell the node that nothing more comes: else it would be busy with it for as
        long as it waits for blocks. An end before the last block makes it forget what it has."""
        transfer, channel, now = self._transfer, self._channel, self._tools.now
        if self.why != DROPPED or transfer is None or channel is None:
            return
        if transfer.state is not State.CHECKING:
            await channel.send(UpdateEnd(transfer.offer.id, transfer.offer.sha384))
        until = now() + CALL_OFF_S
        while transfer.state not in rules.FINAL and now() < until and self.why == DROPPED:
            self._wake.clear()
            await _until(self._wake, until - now())

    def _show(self, transfer: Transfer) -> None:
        length, now = transfer.offer.length, self._tools.now()
        shown: dict[str, Any] = {
            "id": transfer.offer.id, "state": transfer.state.value, "length": length, "block": transfer.block,
            "window": transfer.window, "blocks": transfer.acked, "of_blocks": transfer.blocks,
            "bytes": transfer.bytes, "rate": transfer.pace(now),
            "percent": round(100 * transfer.bytes / length, 1),
        }  # fmt: skip
        if self.request.line == rules.RECOVERY:  # a part of something larger
            shown |= {"state": "sending", "phase": "core"}
        else:
            shown |= {"code": transfer.code, "text": transfer.text}
        self._tools.board.note(self.request.view, **shown)


async def _put(channel: Channel, frame: str) -> None:
    """Send a block when the socket has room for it. Raises _Gone.

    In a task of its own: several senders wait for one socket in one place, and a sender that was cancelled
    there would take the others with it.
    """
    sending = asyncio.create_task(channel.send_bulk(frame))
    await asyncio.wait({sending}, timeout=rules.ACK_S)
    if not sending.done() or sending.cancelled() or not sending.result():
        raise _Gone  # one that reads nothing: its channel ends by the rules for all


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
