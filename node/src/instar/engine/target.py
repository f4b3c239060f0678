"""The interface between the engine and a thing that can be replaced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from instar.core.journal import Progress, Reason
from instar.core.recovery import Observation


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step found out. `data` goes into the journal with the outcome, for the steps that follow;
    `reason` too, for people."""

    data: dict[str, Any] = field(default_factory=dict)
    reason: Reason | None = None


class Failed(Exception):
    """A step failed for good: the transaction is reverted for this reason.

    `blame`: the release itself is at fault, and is kept away from this node for a while.
    """

    def __init__(self, reason: Reason, blame: bool = True) -> None:
        super().__init__(reason.text)
        self.reason = reason
        self.blame = blame


class NotNow(Exception):
    """A passing fault: nothing was decided, the step is to be tried again later."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.text)
        self.reason = reason


class HandOver(Exception):
    """This very process is what gets replaced: become the release that `current` names, which goes on."""


class Notes(Protocol):
    """Lets a long step write to the journal while it works."""

    def note(self, data: dict[str, Any], reason: Reason | None = None) -> None: ...


class Target(Protocol):
    """Every step is idempotent and may be killed anywhere: it is done again from the start.

    A step raises Failed (revert) or NotNow (later); InstarError counts as Failed with its code, but
    ServerUnreachable counts as NotNow: transient faults never decide. Only the engine calls these.
    """

    def observe(self, progress: Progress) -> Observation:
        """What is really there now. Changes nothing."""

    def stage(self, progress: Progress, notes: Notes) -> Outcome:
        """Bring the bytes onto this machine, out of the way of everything."""

    def verify(self, progress: Progress, notes: Notes) -> Outcome:
        """Check every byte against what was signed, and put the release in its final place."""

    def rehearse(self, progress: Progress, notes: Notes) -> Outcome:
        """Run it from its final place; both it and the server must say that it works."""

    def activate(self, progress: Progress, notes: Notes) -> Outcome:
        """Make it what runs, on trial. Returns once it is being started."""

    def watch(self, progress: Progress, notes: Notes) -> Outcome:
        """Watch the trial to its end. Returns when it is to be confirmed."""

    def confirm(self, progress: Progress, notes: Notes) -> Outcome:
        """Make it stay; collect what is no longer needed."""

    def revert(self, progress: Progress, notes: Notes) -> Outcome:
        """Put back what ran before, however far the transaction came, and remove the rest."""
