"""Native update: parcels that come in blocks through the control channel (docs/protocol.md).

Loaded when the first offer comes. The channel only puts blocks into a queue here; they are decoded, written
and synced in a thread, so that a slow disk never holds up the control loop. One transfer at a time, and at
most one window of blocks in memory.

A transfer belongs to its connection. When that is cut, or the agent is killed, what is on the disk stays,
and the next offer of the same parcel goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from instar.agent.aside import aside
from instar.core.errors import InputError, InstarError, MachineError
from instar.core.settings import NativeSettings, Settings
from instar.host.blocks import MOST_ID, RECOVERY, Receiving, Terms, agree, bad_offer, decode_block
from instar.host.clock import Clock
from instar.host.config import has_settings, read_config
from instar.host.files import failed
from instar.host.incoming import Incoming
from instar.host.layout import Layout
from instar.host.line import Line
from instar.host.points import reach
from instar.trust.program import program_digest
from instar.wire.messages import (
    FORCE,
    NEVER,
    Message,
    UpdateAck,
    UpdateBlock,
    UpdateEnd,
    UpdateHave,
    UpdateOffer,
    UpdateState,
)

SILENCE_S = 60.0  # a transfer on which nothing comes for so long is let go

Update = UpdateOffer | UpdateBlock | UpdateEnd

log = logging.getLogger("instar.agent")


class Transfer:
    """One that is under way. Only counted here; what is on the disk is the Receiving's business."""

    def __init__(self, offer: UpdateOffer, terms: Terms, receiving: Receiving) -> None:
        self.offer, self.terms, self.receiving = offer, terms, receiving
        self.next = self.acked = self.had = receiving.blocks
        self.queue: list[UpdateBlock] = []
        self.end: UpdateEnd | None = None
        self.fault: InputError | None = None
        self.pulse = asyncio.Event()
        self.needless = False  # what is offered is installed: most likely nothing follows

    @property
    def idle(self) -> bool:
        return self.needless and self.next == self.had and self.end is None

    @property
    def is_over(self) -> bool:
        """Nothing more comes, and it is not whole: an end came before the last block, or a wrong block."""
        return self.fault is not None or (self.end is not None and self.next < self.receiving.total)

    def take(self, block: UpdateBlock) -> None:
        """Raises InputError `repeated-block`, which changes nothing; other faults end the transfer."""
        if block.n < self.next:
            text = f"cannot use block: expected number {self.next}, got {block.n}, which is here already"
            raise InputError("repeated-block", text)
        longest = -(-self.terms.block // 3) * 4
        if block.n > self.next or block.n >= self.receiving.total or self.end is not None:
            self._fail("wrong-block", f"number {self.next} of {self.receiving.total}", f"{block.n}")
        elif block.n >= self.acked + self.terms.window:
            self._fail("window-exceeded", f"at most {self.terms.window} without an answer", "more")
        elif len(block.data) > longest:
            self._fail("wrong-block-size", f"at most {longest} characters of base64", f"{len(block.data)}")
        else:
            self.next += 1
            self.queue.append(block)
        self.pulse.set()

    def finish(self, end: UpdateEnd) -> None:
        self.end = end
        self.pulse.set()

    def _fail(self, code: str, expected: str, got: str) -> None:
        self.fault = self.fault or InputError(code, f"cannot use block: expected {expected}, got {got}")


class Native:
    """`send` writes to the present connection, if there is one. `received` is told of each whole parcel
    and its line. `running` is the digest of this program."""

    def __init__(
        self,
        layout: Layout,
        running: str,
        send: Callable[[Message], bool],
        received: Callable[[str], None],
        now: Callable[[], float],
        silence_s: float = SILENCE_S,
    ) -> None:
        self._layout, self._running, self._send, self._received = layout, running, send, received
        self._now, self._silence_s = now, silence_s
        self._incoming = Incoming(layout.incoming)
        self._waiting: UpdateOffer | None = None
        self._offered = asyncio.Event()
        self._busy = ""  # the id of the offer that is being answered, received or checked
        self._transfer: Transfer | None = None  # while blocks may come
        self._left = asyncio.Event()  # the connection of `_busy` is gone, or the server begins anew
        self._over: str | None = (
            None  # the id of the last one that failed: blocks of it may still be under way
        )

    # --- what the channel hands in; none of it blocks

    def take(self, message: Update) -> None:
        """Raises InputError for what belongs to no transfer; the transfer's own faults end it instead."""
        if isinstance(message, UpdateOffer):
            self._offer(message)
            return
        transfer = self._transfer
        if transfer is None or transfer.offer.id != message.id or self._left.is_set():
            if message.id == self._over:
                return
            text = f"cannot use '{message.T}': expected it after an offer, got it for {message.id[:80]!a}"
            raise InputError("no-transfer", text)
        if isinstance(message, UpdateBlock):
            transfer.take(message)
        else:
            transfer.finish(message)

    def connected(self) -> None:
        """A new connection: nothing more comes of what was offered on the one before."""
        self._waiting = self._over = None
        self._leave()

    def _offer(self, offer: UpdateOffer) -> None:
        if not 0 < len(offer.id) <= MOST_ID:
            raise bad_offer(f"an id of 1 to {MOST_ID} characters", f"{len(offer.id)}")
        if self._waiting is not None or (self._busy and not self._left.is_set()):
            begun = self._transfer is None or (self._busy != offer.id and not self._transfer.idle)
            if begun or self._waiting is not None:
                text = "cannot take the offer: another transfer is under way"
                self._say(offer.id, "failed", "busy", text)
                return
            self._leave()  # the same one again (the server has lost count), or one that it has no use for
        self._waiting = offer
        self._offered.set()

    def _leave(self) -> None:
        if self._busy:
            self._left.set()
        if self._transfer is not None:
            self._transfer.pulse.set()

    # --- one at a time

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._offered.wait()
            self._offered.clear()
            if self._waiting is None:
                continue
            offer, self._waiting = self._waiting, None
            self._busy = offer.id
            try:
                await self._one(offer)
            except InstarError as error:
                self._fail(offer, error)
            except OSError as error:
                self._fail(offer, failed("use", self._layout.incoming, error))
            finally:
                self._busy, self._transfer = "", None
                self._left.clear()

    async def _one(self, offer: UpdateOffer) -> None:
        """From the offer to its end. Raises InstarError when it failed."""
        settings, rate = await aside(self._settings)
        terms = agree(offer, settings.block, settings.window, rate)
        if settings.mode == "never" and offer.line != RECOVERY:
            self._send(UpdateHave(offer.id, NEVER, 0, *terms))
            return
        self._incoming.check(offer)
        forced = settings.mode == "force" and not await aside(lambda: self._was_taken(offer))
        installed = FORCE if forced else await aside(lambda: self._installed(offer.line))
        receiving = await aside(lambda: self._incoming.open(offer, terms.block))
        if self._left.is_set():
            return
        self._transfer = transfer = Transfer(offer, terms, receiving)
        transfer.needless = installed == offer.digest
        log.info(
            "offered %s %s for %s: %d of %d blocks are here",
            offer.version, offer.digest[:12], offer.line, receiving.blocks, receiving.total,
        )  # fmt: skip
        self._send(UpdateHave(offer.id, installed, receiving.blocks, *terms))
        try:
            await self._receive(transfer)
        except BaseException:
            if transfer.fault is not None:
                await aside(receiving.discard)
            raise
        if transfer.end is None or self._left.is_set():
            await aside(receiving.close)
            return
        await self._finish(transfer, transfer.end)

    async def _receive(self, transfer: Transfer) -> None:
        """Until the end is announced and all is written, or the connection is left. Raises InstarError."""
        free_at = last = self._now()
        while not self._left.is_set():
            if transfer.fault is not None:
                raise transfer.fault
            transfer.pulse.clear()
            if transfer.queue:
                blocks, transfer.queue = transfer.queue, []
                await aside(partial(_write, transfer.receiving, blocks))
                free_at = self._paced(free_at, len(blocks), transfer.terms)
                await self._acknowledge(transfer, free_at)
                last = self._now()
            elif transfer.end is not None:
                return
            elif not await _within(transfer.pulse, last + self._silence_s - self._now()):
                await aside(transfer.receiving.close)  # the part stays
                if transfer.idle:
                    return  # nothing was to come
                text = f"cannot go on: nothing came for {self._silence_s:g} s"
                raise MachineError("nothing-came", text)

    def _paced(self, free_at: float, blocks: int, terms: Terms) -> float:
        """When so many blocks may be acknowledged: the server waits for it, so that keeps the cap."""
        cost = blocks * terms.block / terms.rate_bytes_s if terms.rate_bytes_s else 0.0
        return max(free_at, self._now()) + cost

    async def _acknowledge(self, transfer: Transfer, free_at: float) -> None:
        """After each half window, and after the last block."""
        blocks, terms = transfer.receiving.blocks, transfer.terms
        if blocks - transfer.acked < max(1, terms.window // 2) and blocks < transfer.receiving.total:
            return
        while (wait_s := free_at - self._now()) > 0 and not self._left.is_set():
            if transfer.is_over:
                return  # it need not wait to be told so
            transfer.pulse.clear()
            await _within(transfer.pulse, wait_s)
        if not self._left.is_set():
            transfer.acked = blocks
            self._send(UpdateAck(transfer.offer.id, blocks))

    async def _finish(self, transfer: Transfer, end: UpdateEnd) -> None:
        """Check and unpack; also when the connection goes meanwhile: the next one is told at once then."""
        self._transfer = None
        offer = transfer.offer
        await aside(lambda: transfer.receiving.end(end.sha384))
        reach("native:received")
        log.info("received %s %s for %s", offer.version, offer.digest[:12], offer.line)
        self._over = None
        self._say(offer.id, "received")
        self._received(offer.line)

    # --- the rest

    def _fail(self, offer: UpdateOffer, error: InstarError) -> None:
        self._over = offer.id
        log.warning("native update: %s (%s)", error.text, error.code)
        self._say(offer.id, "failed", error.code, error.text)

    def _say(self, offer_id: str, state: str, code: str = "", text: str = "") -> None:
        self._send(UpdateState(offer_id, state, code, text[:500]))

    def _settings(self) -> tuple[NativeSettings, int]:
        """As they stand in the file now, and the cap on bytes a second; the defaults for an unreadable one."""
        settings = Settings()
        if has_settings(self._layout):
            try:
                settings = read_config(self._layout)
            except InputError as error:
                log.error("%s; going on with the defaults", error.text)
        return settings.native, settings.native.rate_bytes_s or settings.network.rate_bytes_s

    def _was_taken(self, offer: UpdateOffer) -> bool:
        """Whether it has been staged for this very wish: one is forced once. An offer that names no wish is always
        taken."""
        from instar.engine.journal import Journals  # only a node that is forced needs it

        if not offer.generation:
            return False
        journals = Journals(self._layout.journal, Clock())
        return journals.newest_generation(offer.line, offer.digest, staged=True) >= offer.generation

    def _installed(self, line: str) -> str:
        """The digest of what is installed on `line`; '' for nothing."""
        if line == RECOVERY:
            return next((p.digest for p in self._incoming.complete() if p.kind == RECOVERY), "")
        releases = Line(self._layout.line(line))
        try:
            if release := releases.current():
                return program_digest(releases.program(release).read_bytes())
        except (OSError, InputError) as error:
            log.warning("cannot read what is installed for %s: %s", line, error)
            return ""
        return self._running if line == "agent" else ""


def _write(receiving: Receiving, blocks: list[UpdateBlock]) -> None:
    try:
        for block in blocks:
            receiving.block(block.n, decode_block(block.data))
    except InputError:
        receiving.discard()
        raise


async def _within(event: asyncio.Event, seconds: float) -> bool:
    """Whether `event` was set within `seconds`."""
    try:
        async with asyncio.timeout(max(seconds, 0.0)):
            await event.wait()
    except TimeoutError:
        return False
    return True
