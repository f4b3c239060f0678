"""A service module's life: its states, what happens to it, and where that leads.

Everything about order is in `TABLE`; docs/modules-lifecycle.md is generated from it. `LATE` always means
that a bound has passed and that the process is killed for it. The worked example, a module that falls
twice and is then restarted by an operator:

    ABSENT -start-> STARTING -ready-> READY -ended-> FAILED -start-> RETRYING -ended-> FAILED
    -start-> RETRYING -ready-> PROVING -steady-> READY -stop-> STOP_ASKED -saved-> READY_TO_STOP
    -ended-> STOPPED -start-> STARTING
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    ABSENT = "absent"  # nothing of it runs; what it depends on may not be there yet
    STARTING = "starting"  # its process is being made, or has not said that it is ready
    READY = "ready"  # it said that it is ready, and is well
    UNWELL = "unwell"  # it runs, and says itself that it is not well
    FAILED = "failed"  # it fell, or could not be started; it is tried again after a wait
    RETRYING = "retrying"  # started again after it failed
    PROVING = "proving"  # ready after it failed: it must stay so for PROVE_S before it counts
    STOP_ASKED = "stop-asked"  # told to stop; an operation may still be under way
    READY_TO_STOP = "ready-to-stop"  # nothing is under way and its state is saved; its process may end
    STOPPED = "stopped"  # it ended as it was told to
    KILLED = "killed"  # it did not end in time, and was ended


class Event(Enum):
    START = "start"  # its turn has come: what it depends on is ready, and its wait is over
    BLOCKED = "blocked"  # what it depends on is missing, has failed, or depends on it
    READY = "ready"  # it says so
    UNWELL = "unwell"  # it says so
    WELL = "well"  # it says so
    STEADY = "steady"  # it has stayed ready for PROVE_S
    ENDED = "ended"  # its process is gone; nobody had asked for that before STOP
    LATE = "late"  # a bound has passed
    STOP = "stop"  # it is told to stop
    SAVED = "saved"  # it says that it may be stopped
    RETIRED = "retired"  # it is not wanted on this node any more


S, E = State, Event
TABLE: dict[tuple[State, Event], State] = {
    (S.ABSENT, E.START): S.STARTING,
    (S.ABSENT, E.BLOCKED): S.FAILED,
    (S.ABSENT, E.STOP): S.STOPPED,
    (S.STARTING, E.READY): S.READY,
    (S.STARTING, E.ENDED): S.FAILED,
    (S.STARTING, E.LATE): S.FAILED,
    (S.STARTING, E.STOP): S.STOP_ASKED,
    (S.READY, E.UNWELL): S.UNWELL,
    (S.READY, E.ENDED): S.FAILED,
    (S.READY, E.STOP): S.STOP_ASKED,
    (S.UNWELL, E.WELL): S.READY,
    (S.UNWELL, E.ENDED): S.FAILED,
    (S.UNWELL, E.STOP): S.STOP_ASKED,
    (S.FAILED, E.START): S.RETRYING,
    (S.FAILED, E.STOP): S.STOPPED,
    (S.RETRYING, E.READY): S.PROVING,
    (S.RETRYING, E.ENDED): S.FAILED,
    (S.RETRYING, E.LATE): S.FAILED,
    (S.RETRYING, E.STOP): S.STOP_ASKED,
    (S.PROVING, E.STEADY): S.READY,
    (S.PROVING, E.UNWELL): S.UNWELL,
    (S.PROVING, E.ENDED): S.FAILED,
    (S.PROVING, E.STOP): S.STOP_ASKED,
    (S.STOP_ASKED, E.SAVED): S.READY_TO_STOP,
    (S.STOP_ASKED, E.ENDED): S.STOPPED,
    (S.STOP_ASKED, E.LATE): S.KILLED,
    (S.READY_TO_STOP, E.ENDED): S.STOPPED,
    (S.READY_TO_STOP, E.LATE): S.KILLED,
    (S.STOPPED, E.START): S.STARTING,
    (S.STOPPED, E.BLOCKED): S.FAILED,
    (S.STOPPED, E.RETIRED): S.ABSENT,
    (S.KILLED, E.START): S.STARTING,
    (S.KILLED, E.BLOCKED): S.FAILED,
    (S.KILLED, E.RETIRED): S.ABSENT,
}

# What the server and the updater are told.
SHOWN: dict[State, str] = {
    S.ABSENT: "starting",
    S.STARTING: "starting",
    S.READY: "ok",
    S.UNWELL: "failed",
    S.FAILED: "failed",
    S.RETRYING: "failed",
    S.PROVING: "failed",
    S.STOP_ASKED: "starting",
    S.READY_TO_STOP: "starting",
    S.STOPPED: "starting",
    S.KILLED: "starting",
}

UP = frozenset({S.READY, S.UNWELL})  # those that depend on it may start
SERVES = frozenset({S.READY, S.UNWELL, S.PROVING})  # it can be asked
COMING = frozenset({S.ABSENT, S.STARTING, S.STOP_ASKED, S.READY_TO_STOP, S.STOPPED, S.KILLED})  # worth a wait
STOPPING = frozenset({S.STOP_ASKED, S.READY_TO_STOP})

# The bound of a state: which of the manifest's timeouts, or the constant; then LATE, STEADY or START happens.
BOUND: dict[State, str] = {
    S.STARTING: "`ready_s`",
    S.RETRYING: "`ready_s`",
    S.PROVING: "`PROVE_S`",
    S.FAILED: "the backoff",
    S.STOP_ASKED: "`stop_s`, and what is left of the whole",
    S.READY_TO_STOP: "what is left of that",
}

PROVE_S = 1.0
BACKOFF = (0.5, 2.0, 60.0)  # floor, factor, cap, in seconds
STEADY_S = 60.0  # ready for this long: the next failure waits as the first one did


def after(state: State, event: Event) -> State:
    """The state that follows; the same one when `event` means nothing there (a module may say anything)."""
    return TABLE.get((state, event), state)
