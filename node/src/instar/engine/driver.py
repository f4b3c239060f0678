"""Runs a transaction to its end: decide, write the intent, do the step, write the outcome, again.

The driver never trusts memory: before each step it asks the journal and the disk. A kill anywhere
is answered by running `drive` again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from instar.core.errors import InstarError, ReleaseError, ServerUnreachable, TrustError
from instar.core.journal import Progress, Reason
from instar.core.recovery import Fail, Finished, Run, decide
from instar.core.transaction import Event, State, Step, deadline_s
from instar.engine.journal import Journal
from instar.engine.target import Failed, NotNow, Outcome, Target
from instar.host.points import reach

ONE_WAY = frozenset({State.CONFIRMING, State.REVERTING})

BEFORE_ACTIVATION = frozenset({State.OFFERED, State.STAGED, State.VERIFIED, State.REHEARSED})


class Follower(Protocol):
    """Is told of each change of state, after it is on the disk. Must not fail and must not wait."""

    def changed(self, progress: Progress) -> None: ...


Bound = Callable[[float], AbstractContextManager[None]]


def unbounded(seconds: float) -> AbstractContextManager[None]:
    return nullcontext()


def drive(journal: Journal, target: Target, follower: Follower, bound: Bound = unbounded) -> Progress:
    """Go on until the transaction is final. `bound` ends a step by TimeoutError at its deadline.

    Raises NotNow when a passing fault stops it: the transaction stays open, to be driven again later.
    Whatever a step raises that is not an InstarError is a fault of ours, and goes up; the next
    start of the updater drives on, and MOST_TRIES bounds how often.
    """
    while True:
        seen = target.observe(journal.progress)
        match decide(journal.progress, seen):
            case Finished():
                return journal.progress
            case Fail(reason):
                step = journal.progress.step
                if not journal.progress.intended(step):
                    journal.intent(step)
                journal.outcome(step, Event.FAILED, reason, {"blame": True})
            case Run(step):
                _run(journal, target, step, bound)
        follower.changed(journal.progress)


def is_passive(progress: Progress, target: Target) -> bool:
    """Whether it has changed nothing that runs yet."""
    if progress.state not in BEFORE_ACTIVATION:
        return False
    untouched = progress.begin.anew and not progress.intended(Step.ACTIVATE)
    return untouched or target.observe(progress).current != progress.begin.release.name


def abandon(journal: Journal, target: Target, reason: Reason) -> bool:
    """Give up a transaction that has changed nothing that runs yet; whether it could be given up."""
    progress = journal.progress
    if not is_passive(progress, target):
        return False
    journal.intent(progress.step)
    journal.outcome(progress.step, Event.FAILED, reason, {"blame": False})
    return True


def _run(journal: Journal, target: Target, step: Step, bound: Bound) -> None:
    do: Callable[[Progress, Journal], Outcome] = {
        Step.STAGE: target.stage,
        Step.VERIFY: target.verify,
        Step.REHEARSE: target.rehearse,
        Step.ACTIVATE: target.activate,
        Step.WATCH: target.watch,
        Step.CONFIRM: target.confirm,
        Step.REVERT: target.revert,
    }[step]
    journal.intent(step)
    reach(f"step:{step.value}:before")
    most_s = deadline_s(journal.progress.begin.line, step)
    try:
        with bound(most_s) if most_s is not None else nullcontext():
            outcome = do(journal.progress, journal)
    except Failed as failed:
        _failed(journal, step, failed.reason, failed.blame)
        return
    except NotNow as later:
        journal.note({"again": step.value}, later.reason)
        raise
    except ServerUnreachable as error:
        reason = Reason(error.code, error.text)
        journal.note({"again": step.value}, reason)
        raise NotNow(reason) from error
    except InstarError as error:
        # What cannot be trusted before its own bytes are looked at is the server's or a mirror's fault.
        blame = isinstance(error, ReleaseError) or (isinstance(error, TrustError) and step is Step.VERIFY)
        _failed(journal, step, Reason(error.code, error.text), blame)
        return
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _failed(
            journal, step, Reason("machine", f"cannot {step.value}: {error.strerror}{where}"), blame=False
        )
        return
    reach(f"step:{step.value}:after")
    journal.outcome(step, Event.DONE, outcome.reason, outcome.data)


def _failed(journal: Journal, step: Step, reason: Reason, blame: bool) -> None:
    """Write the failure. A one-way state does not move by it: the fault is the machine's, try later."""
    one_way = journal.progress.state in ONE_WAY
    journal.outcome(step, Event.FAILED, reason, {} if one_way else {"blame": blame})
    if one_way:
        raise NotNow(reason)
