"""What becomes of an order on one node: states, what may follow what, and what is due when.

An order is one job or command for many nodes. Which nodes it is for is settled when it is made: one **row**
a node. The node's own word (a result) ends a row once and for all; an end that the server has only
concluded (cancelled, lapsed, lost) gives way to a word that comes late, since the word is what happened.

>>> after(State.SENT, Event.TAKEN), after(State.DONE, Event.LOSE)
(<State.TAKEN: 'taken'>, None)

Times are unix seconds and arguments; nothing here reads a clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

JOB, COMMAND = "job", "command"
NOT_NOW = "not-taken"  # code of a result that is none: the node has no room for the job, and may have later
TAIL = 4096  # bytes of a row's output that are kept


class State(StrEnum):
    QUEUED = "queued"  # stored; the node was not there
    SENT = "sent"  # sent at least once; whether it has arrived is not known
    TAKEN = "taken"  # on the node's disk
    RUNNING = "running"  # the node told of it while it ran
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LAPSED = "lapsed"  # not begun in time
    LOST = "lost"  # taken, and nothing was heard of it until the last moment


class Event(StrEnum):
    SEND = "send"
    TAKEN = "taken"
    BEGUN = "begun"
    SUCCEEDED = "succeeded"  # this and the next three: the node's last word
    FAILED = "failed"
    STOPPED = "stopped"
    EXPIRED = "expired"
    CANCEL = "cancel"  # an operator, before the node has taken it
    LAPSE = "lapse"  # this and the next: the clock
    LOSE = "lose"


OPEN = (State.QUEUED, State.SENT, State.TAKEN, State.RUNNING)
WAITING = (State.QUEUED, State.SENT)  # not known to be on the node's disk
HELD = (State.TAKEN, State.RUNNING)
CONCLUDED = (State.CANCELLED, State.LAPSED, State.LOST)
WORDS = (Event.SUCCEEDED, Event.FAILED, Event.STOPPED, Event.EXPIRED)

_FROM: dict[Event, tuple[tuple[State, ...], State]] = {
    Event.SEND: (WAITING, State.SENT),
    Event.TAKEN: (WAITING, State.TAKEN),
    Event.BEGUN: ((*WAITING, State.TAKEN), State.RUNNING),
    Event.SUCCEEDED: ((*OPEN, *CONCLUDED), State.DONE),
    Event.FAILED: ((*OPEN, *CONCLUDED), State.FAILED),
    Event.STOPPED: ((*OPEN, *CONCLUDED), State.CANCELLED),
    Event.EXPIRED: ((*OPEN, *CONCLUDED), State.LAPSED),
    Event.CANCEL: (WAITING, State.CANCELLED),
    Event.LAPSE: (WAITING, State.LAPSED),
    Event.LOSE: (OPEN, State.LOST),
}
TABLE: dict[tuple[State, Event], State] = {
    (state, event): to for event, (states, to) in _FROM.items() for state in states
}


def after(state: State, event: Event) -> State | None:
    """The state that follows, None where the event changes nothing."""
    return TABLE.get((state, event))


def sources(event: Event) -> tuple[State, ...]:
    """The states in which an event counts."""
    return _FROM[event][0]


def target(event: Event) -> State:
    return _FROM[event][1]


def word_of(ok: bool, code: str) -> Event:
    """Which last word a result is."""
    if ok:
        return Event.SUCCEEDED
    return {"cancelled": Event.STOPPED, "lapsed": Event.EXPIRED}.get(code, Event.FAILED)


# ---- what is due


@dataclass(frozen=True, slots=True)
class Rules:
    """Seconds. A row that is not taken is sent again `resend_s` later, then at growing distances up to
    `resend_cap_s`. A node that has taken one is asked when it is `silence_s` late with its result."""

    resend_s: float = 10.0
    resend_cap_s: float = 300.0
    silence_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Row:
    """What decides about one row. `heard_at`: when the node took it, or told that it runs."""

    id: str
    order: str
    node: str
    state: State
    deadline_s: float
    lapse_at: float
    sent_at: float | None = None
    sends: int = 0
    heard_at: float = 0.0
    cancelled: bool = False  # its order is
    revoked: bool = False  # its node is
    refused: str = ""  # why the node would not take it when it was sent last


class Do(StrEnum):
    WAIT = "wait"
    SEND = "send"  # send it (again), or its cancel when the order is cancelled
    END = "end"


@dataclass(frozen=True, slots=True)
class Step:
    """`due_at`: when to look again; None: never. `event`, `code` and `text` belong to an END."""

    do: Do
    due_at: float | None
    event: Event | None = None
    code: str = ""
    text: str = ""


def decide(row: Row, connected: bool, now: float, rules: Rules) -> Step:
    """What is to be done about a row now."""
    if row.state not in OPEN:
        return Step(Do.WAIT, None)
    if row.revoked:
        return Step(Do.END, None, Event.LOSE, "revoked", "the node was revoked")
    return (_waiting if row.state in WAITING else _held)(row, connected, now, rules)


def decide_joined(row: Row, now: float, rules: Rules) -> Step:
    """What is to be done about a row, or a cancelled one, when its node has just come."""
    if row.state in OPEN and row.revoked:
        return decide(row, True, now, rules)
    if row.state in WAITING:
        due = min(now + resend_gap(row.id, row.sends + 1, rules), row.lapse_at)
        return Step(Do.SEND, due) if now < row.lapse_at else _waiting(row, True, now, rules)
    if row.state in HELD:  # it sends its results by itself
        end = row.lapse_at + row.deadline_s + rules.silence_s
        due = min(max(now, row.heard_at) + row.deadline_s + rules.silence_s, max(now + rules.silence_s, end))
        return Step(Do.SEND if row.cancelled else Do.WAIT, due)
    return Step(Do.SEND if row.cancelled else Do.WAIT, None)


def _waiting(row: Row, connected: bool, now: float, rules: Rules) -> Step:
    if now >= row.lapse_at:
        why = "it was sent, and never confirmed" if row.sends else "its node was never connected"
        if row.refused:
            why = f"its node would not take it: {row.refused}"
        return Step(Do.END, None, Event.LAPSE, "lapsed", f"not begun before it lapsed: {why}")
    if not connected:
        return Step(Do.WAIT, row.lapse_at)  # its coming is what sends it
    due = now if row.sent_at is None else row.sent_at + resend_gap(row.id, row.sends, rules)
    if now < due:
        return Step(Do.WAIT, min(due, row.lapse_at))
    return Step(Do.SEND, min(now + resend_gap(row.id, row.sends + 1, rules), row.lapse_at))


def _held(row: Row, connected: bool, now: float, rules: Rules) -> Step:
    end = row.lapse_at + row.deadline_s + (rules.silence_s if connected else 0.0)
    if now >= end:
        code, who = ("no-result", "is connected") if connected else ("node-gone", "has gone")
        text = f"the node had taken it and {who}; no result came in all the time that it had"
        return Step(Do.END, None, Event.LOSE, code, text)
    ask_at = row.heard_at + row.deadline_s + rules.silence_s
    if not connected:
        return Step(Do.WAIT, end)
    if now < ask_at:
        return Step(Do.WAIT, min(ask_at, end))
    return Step(Do.SEND, min(now + row.deadline_s + rules.silence_s, end))


def resend_gap(id_: str, sends: int, rules: Rules) -> float:
    """How long after the `sends`th time of sending the next one is due. Up to a quarter is added by the
    row's own name, so that the rows of one order are not all due at once."""
    gap = min(rules.resend_cap_s, rules.resend_s * 2.0 ** min(20, max(0, sends - 1)))
    return float(gap * (1 + (hash_of(id_) % 256) / 1024))


def hash_of(text: str) -> int:
    """The same in every process, unlike `hash`."""
    value = 0
    for char in text:
        value = (value * 31 + ord(char)) & 0xFFFF
    return value


def tail(text: str, more: str) -> str:
    """The last TAIL bytes of what was said, whole characters only."""
    joined = (text + more).encode("utf-8", "replace")
    return joined[-TAIL:].decode("utf-8", "ignore") if len(joined) > TAIL else text + more
