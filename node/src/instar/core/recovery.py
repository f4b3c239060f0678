"""What comes next in a transaction, from its journal and from what is really there. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from instar.core.journal import Progress, Reason
from instar.core.transaction import MOST_TRIES, State, Step


@dataclass(frozen=True, slots=True)
class Observation:
    """What `Target.observe` saw. `current` is the release that would run now ('' when none would)."""

    current: str
    previous: str = ""
    undone: Reason | None = None  # the launcher or a guard put the old release back, and why


@dataclass(frozen=True, slots=True)
class Finished:
    pass


@dataclass(frozen=True, slots=True)
class Run:
    step: Step


@dataclass(frozen=True, slots=True)
class Fail:
    """Count the step of the present state as failed, without running it."""

    reason: Reason


Decision = Finished | Run | Fail


def decide(progress: Progress, seen: Observation) -> Decision:
    """The next thing to do. Never trusts the journal about what only the disk can tell."""
    if progress.finished:
        return Finished()
    candidate = progress.begin.release.name
    if seen.undone is not None and progress.state in (State.REHEARSED, State.TRIAL):
        return Fail(seen.undone)
    if progress.state is State.TRIAL and seen.current != candidate:
        return Fail(Reason("undone", f"{seen.current or 'nothing'} is active in its place"))
    step = progress.step
    most = MOST_TRIES.get(step)
    if most is not None and progress.tries.get(step, 0) >= most:
        text = f"{step.value} was begun {most} times and never ended"
        return Fail(Reason("interrupted-too-often", text))
    return Run(step)
