"""One parcel's way through a control channel: window, rate, resumption. A machine without clock and socket.

    offered --have--> sending --the last block--> checking --its word--> received | failed
       +--> declined, not-needed                      (any of the three may end as failed)

The caller asks `next(now)` what to do, does it, and hands in what the node says:

    >>> offer = UpdateOffer("u-1", "agent", "1.0.0", "ab", "node/x", 2500, "cd", block=1024, window=2)
    >>> transfer = Transfer(offer, 0.0)
    >>> transfer.have(UpdateHave("u-1", "ef", 1, 1024, 2), 0.5)      # one block is there from before
    >>> transfer.next(0.5), transfer.next(0.5)
    (Send(n=1, start=1024, size=1024), Send(n=2, start=2048, size=452))
    >>> transfer.ack(3, 0.6)
    >>> transfer.next(0.6)
    End()
    >>> transfer.word(UpdateState("u-1", "received"), 0.7); transfer.state.value
    'received'
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from instar.wire.messages import BLOCK_BOUNDS, FORCE, NEVER, UpdateHave, UpdateOffer, UpdateState

ANSWER_S = 60.0  # from the offer to the answer
ACK_S = 60.0  # while blocks are under way, from one ack to the next
CHECK_S = 300.0  # for the node to check and unpack the whole
LEAST_RATE = 1_024  # bytes a second: a node's cap below counts as this, as nodes take the server's
WHOLE_S = (
    120.0  # for all blocks, beside twice what they take at the rate, or at LEAST_RATE where there is no cap
)
MOST_AT_ONCE = 64  # transfers of one server, of each kind: an operator's, beacons', all others
RECOVERY = "recovery"  # the line of recovery cores

FLOOR_S, CAP_S = 5.0, 600.0  # between two tries that failed
FORGET_S = 3600.0  # so long after a rest nothing is held against a node any more
SPARE_FLOOR_S, SPARE_CAP_S = 60.0, 21_600.0  # between two offers of what the node has taken, or has


class State(Enum):
    OFFERED = "offered"
    SENDING = "sending"
    CHECKING = "checking"
    RECEIVED = "received"
    NOT_NEEDED = "not-needed"  # the node runs that already
    DECLINED = "declined"  # the node takes no native update
    FAILED = "failed"


FINAL = frozenset({State.RECEIVED, State.NOT_NEEDED, State.DECLINED, State.FAILED})


@dataclass(frozen=True, slots=True)
class Send:
    """Block `n`, which is `size` bytes from byte `start` on."""

    n: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class End:
    """Every block has been sent: say so."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do until the node speaks, or until this time."""

    until: float


@dataclass(frozen=True, slots=True)
class Over:
    """It has ended; `state` says how."""


Step = Send | End | Wait | Over


@dataclass(slots=True)
class Transfer:
    """`code` and `text` say why it failed. What a node says out of turn changes nothing, or fails it."""

    offer: UpdateOffer
    began: float
    state: State = State.OFFERED
    block: int = 0  # bytes, as agreed
    window: int = 0  # blocks
    rate: int = 0  # bytes a second; 0: no cap
    blocks: int = 0  # of the whole
    resumed: int = 0  # blocks that were there before
    sent: int = 0
    acked: int = 0
    started: float = 0.0  # when the answer came
    code: str = ""
    text: str = ""
    _quiet: float = field(default=0.0, repr=False)  # since when the node owes a word
    _free_at: float = field(default=0.0, repr=False)  # when the rate lets the next block go
    _late_at: float = field(default=0.0, repr=False)  # when the last block must have been acknowledged

    def __post_init__(self) -> None:
        self._quiet = self.began

    # ---- what the node says

    def have(self, said: UpdateHave, now: float) -> None:
        """The answer to the offer. One that comes again changes nothing."""
        if self.state is not State.OFFERED:
            return
        offer = self.offer
        if said.digest == NEVER:
            self._end(State.DECLINED, "never", "the node takes no update through its channel")
            return
        # For a recovery core there is no installed digest to compare with: what is on the disk counts.
        if offer.line != RECOVERY and said.digest == offer.digest and said.digest != FORCE:
            self._end(State.NOT_NEEDED, "", "the node has it already")
            return
        block, window = min(offer.block, said.block), min(offer.window, said.window)
        blocks = -(-offer.length // block) if block >= BLOCK_BOUNDS[0] else 0
        if not (blocks and window >= 1 and 0 <= said.have <= blocks and said.rate_bytes_s >= 0):
            text = f"blocks of {said.block} bytes, a window of {said.window}, {said.have} of {blocks} there"
            self._end(State.FAILED, "bad-have", f"cannot send: the node asks for {text}")
            return
        self.state, self.block, self.window, self.blocks = State.SENDING, block, window, blocks
        rates = (max(rate, LEAST_RATE) for rate in (offer.rate_bytes_s, said.rate_bytes_s) if rate)
        self.rate = min(rates, default=0)
        self.resumed = self.sent = self.acked = said.have
        self.started = self._quiet = self._free_at = now
        left = max(0, offer.length - said.have * block)
        self._late_at = now + 2 * left / max(self.rate, LEAST_RATE) + WHOLE_S

    def ack(self, n: int, now: float) -> None:
        """So many blocks are there. Fewer than before is an old word; more than were sent fails it."""
        if self.state not in (State.SENDING, State.CHECKING):
            return
        if n > self.sent:
            self._end(State.FAILED, "bad-ack", f"cannot send: {self.sent} blocks were sent, {n} acknowledged")
        elif n > self.acked:
            self.acked, self._quiet = n, now

    def word(self, said: UpdateState, now: float) -> None:
        """How it ended on the node; the node may say so at any time, as when its disk is full."""
        if self.state in FINAL:
            return
        if said.state == State.RECEIVED.value:
            self.acked = self.sent = self.blocks
            self._end(State.RECEIVED)
        else:
            code = said.code[:64] if said.state == State.FAILED.value else "bad-state"
            self._end(State.FAILED, code or "failed", said.text[:2000])

    # ---- what to do

    def next(self, now: float) -> Step:
        """What is to be done now; a block or the end that is handed out counts as sent."""
        if self.state in FINAL:
            return Over()
        if now >= self._deadline():
            self._end(State.FAILED, *self._silence(now))
            return Over()
        if self.state is not State.SENDING:
            return Wait(self._deadline())
        if self.sent == self.blocks:
            self.state = State.CHECKING
            if self.acked == self.sent:
                self._quiet = now
            return End()
        if self.sent - self.acked >= self.window:
            return Wait(self._deadline())
        if self.rate and self._free_at > now:
            return Wait(min(self._free_at, self._deadline()))
        return self._send(now)

    def _send(self, now: float) -> Send:
        n = self.sent
        start = n * self.block
        size = min(self.block, self.offer.length - start)
        if self.acked == n:
            self._quiet = now  # nothing was under way: from now on the node owes an ack
        self.sent += 1
        if self.rate:
            self._free_at = max(now, self._free_at) + size / self.rate
        return Send(n, start, size)

    def _deadline(self) -> float:
        if self.state is State.OFFERED:
            return self._quiet + ANSWER_S
        if self.acked < self.sent:
            return min(self._quiet + ACK_S, self._late_at)
        return self._quiet + CHECK_S if self.state is State.CHECKING else self._late_at

    def _silence(self, now: float) -> tuple[str, str]:
        """Code and text, once the deadline is over."""
        if self.state is State.OFFERED:
            return "no-answer", f"the node has not answered the offer for {ANSWER_S:g} s"
        if self.acked < self.blocks and now >= self._late_at:
            return "too-slow", f"{self.acked} of {self.blocks} blocks came in {now - self.started:.0f} s"
        if self.acked < self.sent:
            return "no-ack", f"the node has acknowledged nothing for {ACK_S:g} s"
        return "no-ack", f"the node has not said for {CHECK_S:g} s what came of it"

    def _end(self, state: State, code: str = "", text: str = "") -> None:
        self.state, self.code, self.text = state, code, text

    # ---- for those who watch

    @property
    def bytes(self) -> int:
        """So many are on the node's disk."""
        return min(self.acked * self.block, self.offer.length)

    def pace(self, now: float) -> float:
        """Bytes a second, from the first block that was sent to now."""
        moved = self.bytes - min(self.resumed * self.block, self.offer.length)
        return moved / (now - self.started) if self.started and now > self.started else 0.0


@dataclass(frozen=True, slots=True)
class Rest:
    """When a node may be offered a wish's parcel again: not before `until`, unless the wish is a new one. `idle`:
    nothing was sent the last time, so that asking again costs little."""

    generation: int
    tries: int
    until: float
    idle: bool = False

    def over(self, generation: int, now: float) -> bool:
        return generation > self.generation or now >= self.until


def rest(before: Rest | None, generation: int, ended: str, now: float, chance: float) -> Rest:
    """The rest after a transfer that ended as `ended` (a State's value, or `cut` when the channel ended before).

    `chance`, 0 to 1, spreads the waits of many nodes: each is up to a quarter longer. What moved before it
    was cut is `moved` and waits for nothing: its node goes on where it was as soon as it is back.
    """
    same = before if before is not None and before.generation == generation else None
    if same is not None and now - same.until > FORGET_S:
        same = None
    if ended == "moved":
        return Rest(generation, 0, now)
    tries = same.tries + 1 if same else 1
    idle = ended in (State.NOT_NEEDED.value, State.DECLINED.value)
    well = idle or ended == State.RECEIVED.value
    floor, cap = (SPARE_FLOOR_S, SPARE_CAP_S) if well else (FLOOR_S, CAP_S)
    wait = min(cap, floor * 2.0 ** min(20, tries - 1))
    return Rest(generation, tries, now + wait * (1.0 + chance / 4), idle)
