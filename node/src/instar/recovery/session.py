"""What a server may have done through the beacon: send a recovery core, and have it run.

Frozen, as all of the beacon. Import diet: bare standard library, `core`, `wire` and `host`.
"""

from __future__ import annotations

import os
import time

from instar.core.errors import InputError, InstarError, ServerUnreachable
from instar.host import rescue
from instar.host.clock import Clock
from instar.host.identity import read_node
from instar.host.incoming import Incoming, Receiving, Terms, agree, decode_block
from instar.host.layout import Layout
from instar.host.points import reach
from instar.recovery.dialling import Wire, refusal, say
from instar.wire.messages import (
    NEVER,
    AgentUpdate,
    AgentUpdateEnded,
    AgentUpdateProgress,
    Error,
    Message,
    Ping,
    Pong,
    Refused,
    UpdateAck,
    UpdateBlock,
    UpdateEnd,
    UpdateHave,
    UpdateOffer,
    UpdateState,
    Welcome,
)

RECOVERY = "recovery"  # the line of recovery cores
BLOCK, WINDOW = 65_536, 16
TAIL = 4_096  # bytes of a core's stderr


class Session:
    """What the server wants done on one connection."""

    def __init__(self, layout: Layout, clock: Clock, wire: Wire) -> None:
        self._layout, self._clock, self._wire = layout, clock, wire
        self._incoming = Incoming(layout.incoming)
        self._taking: Taking | None = None
        self._over = ""  # the id of the last transfer that failed: blocks of it may still be under way
        self._running: Running | None = None

    @property
    def busy(self) -> bool:
        return self._running is not None

    def descriptors(self) -> list[int]:
        return self._running.descriptors() if self._running is not None else []

    def heed(self, message: Message) -> None:
        """Obey one message. What cannot be obeyed is answered; the connection stays. Raises Refusal."""
        if isinstance(message, Ping):
            self._wire.send(Pong(message.n))
        elif isinstance(message, UpdateOffer):
            self._offered(message)
        elif isinstance(message, (UpdateBlock, UpdateEnd)):
            self._blocks(message)
        elif isinstance(message, AgentUpdate):
            self._ordered(message)
        elif isinstance(message, Refused):
            raise refusal(message)
        elif isinstance(message, Error):
            say(f"the server could not use a frame: {ascii(message.message)[:300]}")
        elif not isinstance(message, (Pong, Welcome)):
            text = f"cannot use '{message.T}': no release of the agent runs here, this is its beacon"
            self._wire.send(Error("unexpected-type", text))

    def close(self) -> None:
        """Leave a core alone, if one runs: it goes on by itself. Parts of parcels stay."""
        if self._taking is not None:
            self._taking.receiving.close()
        if self._running is not None:
            self._running.close()

    # --- the recovery core comes

    def _offered(self, offer: UpdateOffer) -> None:
        if self._taking is not None:
            self._taking.receiving.close()
            self._taking = None
        try:
            terms = agree(offer, BLOCK, WINDOW, 0)
            if offer.line != RECOVERY:  # nothing here could install it
                self._wire.send(UpdateHave(offer.id, NEVER, 0, *terms))
                return
            receiving = self._incoming.open(offer, terms.block)
        except InstarError as error:
            self._failed(offer.id, error)
            return
        self._taking = Taking(offer, terms, receiving)
        cores = (parcel.digest for parcel in self._incoming.complete() if parcel.kind == RECOVERY)
        self._wire.send(UpdateHave(offer.id, next(cores, ""), receiving.blocks, *terms))

    def _blocks(self, message: UpdateBlock | UpdateEnd) -> None:
        taking = self._taking
        if taking is None or taking.offer.id != message.id:
            if message.id != self._over:
                text = f"cannot use '{message.T}': expected it after an offer, got it for {message.id[:80]!a}"
                self._wire.send(Error("no-transfer", text))
            return
        try:
            if isinstance(message, UpdateEnd):
                taking.receiving.end(message.sha384)
                self._taking = None
                reach("beacon:received")
                say(f"received the recovery core {taking.offer.version} ({taking.offer.digest[:12]})")
                self._wire.send(UpdateState(message.id, "received"))
            elif taking.take(message):
                self._wire.send(UpdateAck(message.id, taking.acked))
        except InstarError as error:
            if isinstance(error, ServerUnreachable):  # of the sending, not of the block
                raise
            taking.receiving.discard()
            self._taking = None
            self._failed(message.id, error)

    def _failed(self, offer_id: str, error: InstarError) -> None:
        say(f"{error.text} ({error.code})")
        self._over = offer_id
        self._wire.send(UpdateState(offer_id[:200], "failed", error.code, error.text[:500]))

    # --- the recovery core runs

    def _ordered(self, order: AgentUpdate) -> None:
        try:
            rescue.check_order(order)
        except InputError as error:
            self._wire.send(Error(error.code, error.text))
            return
        if self._running is not None:
            if self._running.order_id != order.id:
                text = f"cannot recover: the recovery {self._running.order_id[:80]!a} is under way"
                self._wire.send(AgentUpdateEnded(order.id, False, "busy", text))
            return
        if rescue.is_running(self._layout, self._clock):
            text = "cannot recover: a recovery core runs already"
            self._wire.send(AgentUpdateEnded(order.id, False, "recovery-running", text))
            return
        self._wire.send(AgentUpdateProgress(order.id, "verify"))
        layout, server = self._layout, read_node(self._layout).server
        try:
            core, file = rescue.prepare(layout, order, [layout.launcher], self._wire.pin(), server)
            self._wire.send(AgentUpdateProgress(order.id, "start"))
            running = rescue.start(layout, core, file, self._clock)
        except ServerUnreachable:  # of the sending
            raise
        except InstarError as error:
            say(f"{error.text} ({error.code})")
            self._wire.send(AgentUpdateEnded(order.id, False, error.code, error.text[:500]))
            return
        say(f"running the recovery core {order.core[:12]}")
        self._running = Running(order.id, running)

    def follow(self) -> bool:
        """Tell what the core has said; whether it has ended, and well."""
        running = self._running
        if running is None:
            return False
        status = running.status()  # before its words are read: then none of them is missed
        for word in running.words():
            self._wire.send(word)
        if status is None:
            return False
        ended = running.outcome(status)
        self._running = None
        running.close()
        say(
            "the recovery is done" if ended.ok else f"the recovery failed: {ended.text!a:.500} ({ended.code})"
        )
        self._wire.send(ended)
        return ended.ok


class Taking:
    """A parcel that comes. `acked`: how many of its blocks were acknowledged."""

    def __init__(self, offer: UpdateOffer, terms: Terms, receiving: Receiving) -> None:
        self.offer, self.terms, self.receiving = offer, terms, receiving
        self.acked = receiving.blocks

    def take(self, block: UpdateBlock) -> bool:
        """Write it; whether an acknowledgement is due. Raises InputError, MachineError."""
        have = self.receiving.block(block.n, decode_block(block.data))
        if have - self.acked < max(1, self.terms.window // 2) and have < self.receiving.total:
            return False
        self.acked = have
        return True


class Running:
    """A core that runs, and what it says."""

    def __init__(self, order_id: str, core: rescue.Core) -> None:
        self.order_id, self._core = order_id, core
        self._until = time.monotonic() + rescue.WITHIN_S
        self._rest, self._tail = bytearray(), bytearray()
        self._ended: AgentUpdateEnded | None = None
        self._late = False
        self._open = {core.stdout, core.stderr}
        for fd in self._open:
            os.set_blocking(fd, False)

    def descriptors(self) -> list[int]:
        return sorted(self._open)

    def words(self) -> list[Message]:
        """What it has said since; its last word is kept until it has ended indeed."""
        self._drain(self._core.stdout, self._rest)
        self._drain(self._core.stderr, self._tail)
        del self._tail[:-TAIL]
        said: list[Message] = []
        while (at := self._rest.find(b"\n")) >= 0:
            word = rescue.heard(self.order_id, bytes(self._rest[:at]))
            del self._rest[: at + 1]
            if isinstance(word, AgentUpdateEnded):
                self._ended = word
            elif word is not None:
                said.append(word)
        if len(self._rest) > rescue.MOST_LINE:
            self._rest.clear()
        return said

    def status(self) -> int | None:
        """Its exit status; None while it runs. One that takes too long is killed."""
        status = self._core.poll()
        if status is None and time.monotonic() > self._until and not self._late:
            self._late = True
            self._core.kill()
        return status

    def outcome(self, status: int) -> AgentUpdateEnded:
        tail = self._tail.decode(errors="replace")
        return rescue.outcome(self.order_id, status, self._ended, tail, self._late)

    def close(self) -> None:
        for fd in (self._core.stdout, self._core.stderr):
            os.close(fd)

    def _drain(self, fd: int, into: bytearray) -> None:
        while fd in self._open:
            try:
                chunk = os.read(fd, 65_536)
            except BlockingIOError:
                return
            if not chunk:
                self._open.discard(fd)  # it would be readable for ever
            into += chunk
