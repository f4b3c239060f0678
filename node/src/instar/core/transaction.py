"""The one transaction: its states, the step each state owes, and where an outcome leads.

Everything about order is in `TABLE`; docs/transaction.md is generated from it. A step is
idempotent: after a kill it is simply done again. The worked example, an update that crashes
on trial:

    OFFERED -stage-> STAGED -verify-> VERIFIED -rehearse-> REHEARSED -activate-> TRIAL
    -watch fails-> REVERTING -revert-> REVERTED
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    OFFERED = "offered"  # wanted; nothing of it is on the disk
    STAGED = "staged"  # its bytes are on the disk, out of the way of everything
    VERIFIED = "verified"  # in its final place, each file as signed, marked valid
    REHEARSED = "rehearsed"  # ran from its final place; it and the server say it works
    TRIAL = "trial"  # it is what runs, on a lease
    CONFIRMING = "confirming"  # decided for good; there is no way back from here
    CONFIRMED = "confirmed"
    REVERTING = "reverting"  # decided for good; the old release is being put back
    REVERTED = "reverted"


class Step(Enum):
    STAGE = "stage"
    VERIFY = "verify"
    REHEARSE = "rehearse"
    ACTIVATE = "activate"
    WATCH = "watch"
    CONFIRM = "confirm"
    REVERT = "revert"


class Event(Enum):
    DONE = "done"
    FAILED = "failed"


FINAL = frozenset({State.CONFIRMED, State.REVERTED})

STEP: dict[State, Step] = {
    State.OFFERED: Step.STAGE,
    State.STAGED: Step.VERIFY,
    State.VERIFIED: Step.REHEARSE,
    State.REHEARSED: Step.ACTIVATE,
    State.TRIAL: Step.WATCH,
    State.CONFIRMING: Step.CONFIRM,
    State.REVERTING: Step.REVERT,
}

TABLE: dict[tuple[State, Event], State] = {
    (State.OFFERED, Event.DONE): State.STAGED,
    (State.OFFERED, Event.FAILED): State.REVERTING,
    (State.STAGED, Event.DONE): State.VERIFIED,
    (State.STAGED, Event.FAILED): State.REVERTING,
    (State.VERIFIED, Event.DONE): State.REHEARSED,
    (State.VERIFIED, Event.FAILED): State.REVERTING,
    (State.REHEARSED, Event.DONE): State.TRIAL,
    (State.REHEARSED, Event.FAILED): State.REVERTING,
    (State.TRIAL, Event.DONE): State.CONFIRMING,
    (State.TRIAL, Event.FAILED): State.REVERTING,
    # Both decisions are one-way: their steps are done again until they are done.
    (State.CONFIRMING, Event.DONE): State.CONFIRMED,
    (State.CONFIRMING, Event.FAILED): State.CONFIRMING,
    (State.REVERTING, Event.DONE): State.REVERTED,
    (State.REVERTING, Event.FAILED): State.REVERTING,
}

# How often a step may be begun before it counts as failed: a step that takes the machine
# down with it must not do so for ever. Watching, confirming and reverting have other bounds.
MOST_TRIES: dict[Step, int] = {Step.STAGE: 5, Step.VERIFY: 5, Step.REHEARSE: 3, Step.ACTIVATE: 5}

# Seconds that one try of a step may take. The rehearsal is bounded by a setting, the trial by its lease.
DEADLINE_S: dict[Step, float] = {
    Step.STAGE: 3600.0,
    Step.VERIFY: 300.0,
    Step.ACTIVATE: 120.0,
    Step.CONFIRM: 60.0,
    Step.REVERT: 120.0,
}

# Lines that need longer: one or two whole slots are read back, from a slow disk too.
LONGER_S: dict[tuple[str, Step], float] = {("os", Step.VERIFY): 1800.0}


def deadline_s(line: str, step: Step) -> float | None:
    """Seconds that one try of a step of this line may take; None where something else bounds it."""
    return LONGER_S.get((line, step), DEADLINE_S.get(step))


def after(state: State, event: Event) -> State:
    """The state that follows. Raises ValueError for a final state: nothing follows it."""
    try:
        return TABLE[state, event]
    except KeyError:
        raise ValueError(f"cannot leave {state.value}: it is final") from None
