"""Bring each line of the order to the wanted release, by the ordinary transaction, whatever was there before."""

from __future__ import annotations

import logging
import random
import uuid
from collections.abc import Callable
from pathlib import Path

from instar.core.backoff import Backoff
from instar.core.errors import InstarError, MachineError, ReleaseError
from instar.core.journal import Begin, Progress, Reason
from instar.core.transaction import Event, State
from instar.engine.driver import BEFORE_ACTIVATION, Follower, drive
from instar.engine.journal import Journal, Journals
from instar.engine.target import HandOver, NotNow
from instar.host import processes
from instar.host.alarm import within
from instar.host.points import reach
from instar.rescue.order import Order
from instar.rescue.role import UpdatersRole
from instar.rescue.targets import place, target_of
from instar.targets.kit import Kit
from instar.targets.release import ReleaseTarget

WAITS = (0.5, 2.0, 20.0)  # after a passing fault, in seconds
PASSING_S = 240.0  # how long such faults may keep one line from its end
SETTLE_S = 60.0  # for a new updater, beyond its lease
LOOK_S = 0.1

log = logging.getLogger("instar.rescue")


class Lines:
    def __init__(self, kit: Kit, order: Order, role: UpdatersRole, follower: Follower) -> None:
        self.kit, self.order, self.role, self.follower = kit, order, role, follower
        self.journals = Journals(kit.layout.journal, kit.clock)

    def replace(self, archive: Path, flush: Callable[[], None]) -> None:
        """All lines of the order, one after the other. `flush` is called before the updater is let go on.

        Raises ReleaseError, NotNow or InstarError for the first line that does not come to the wanted release.
        """
        for line in self.order.lines:
            self.end_open(line)
        for line in self.order.lines:
            target = target_of(line, self.kit)
            if self._is_there(target):
                log.info("%s is at the wanted release already", line)
                continue
            journal = self._begin(target, archive)
            try:
                self._to_its_end(journal, target)
            except HandOver:
                flush()
                self.role.give_back(anew=True)
                self._await(journal)

    def end_open(self, line: str) -> None:
        """What an updater left open on `line`: given up if nothing of it runs, else driven to its end."""
        target = target_of(line, self.kit)
        for journal in self.journals.unfinished():
            begin = journal.progress.begin
            if begin.line != line:
                continue
            if self._may_give_up(journal, target):
                reason = Reason("superseded", "a recovery core replaces this line")
                journal.intent(journal.progress.step)
                journal.outcome(journal.progress.step, Event.FAILED, reason, {"blame": False})
            log.info("%s: ending what %s left open in %s", line, begin.tx, journal.progress.state.value)
            self._driven(journal, target)

    def _may_give_up(self, journal: Journal, target: ReleaseTarget) -> bool:
        """Not what is decided, on trial, or was switched to a moment before its driver died."""
        progress = journal.progress
        if progress.state not in BEFORE_ACTIVATION:
            return False
        switched = progress.state is State.REHEARSED and progress.intended(progress.step)
        at_it = target.observe(progress).current == progress.begin.release.name
        return not (switched and at_it) or target.role == "updater"

    def _is_there(self, target: ReleaseTarget) -> bool:
        """Whether the line is at the wanted release, whole, and, for the agent, it runs."""
        release = self.order.release.name
        if target.line.current() != release or not target.line.is_valid(release):
            return False
        process = processes.recorded(self.kit.layout.process(target.role))
        runs = process is not None and processes.alive(process, self.kit.clock.boot_id())
        return target.role == "updater" or (runs and process is not None and process.release == release)

    def _begin(self, target: ReleaseTarget, archive: Path) -> Journal:
        order, line = self.order, target.line
        begin = Begin(
            f"tx-{uuid.uuid4().hex[:16]}", target.role, order.release.version, order.release.digest,
            order.target, line.current(), line.previous(), "recovery", via="recovery",
        )  # fmt: skip
        place(archive, self.kit, begin.tx)
        reach("rescue:placed")
        return self.journals.begin(begin)

    def _to_its_end(self, journal: Journal, target: ReleaseTarget) -> None:
        end = self._driven(journal, target)
        if end.state is not State.CONFIRMED:
            raise _reverted(end)

    def _driven(self, journal: Journal, target: ReleaseTarget) -> Progress:
        """Drive past passing faults, for a while. Raises NotNow, HandOver."""
        backoff, clock = Backoff(*WAITS), self.kit.clock
        end = clock.monotonic() + PASSING_S
        while True:
            try:
                return drive(journal, target, self.follower, within)
            except NotNow as later:
                log.warning("%s: later: %s", target.role, later.reason.text)
                if clock.monotonic() > end:
                    self._give_up(journal, target, later.reason)
                    raise
            self.kit.sleep(backoff.next(random.random()))

    def _give_up(self, journal: Journal, target: ReleaseTarget, reason: Reason) -> None:
        """One that nothing runs of yet must not stay open: no updater can bring its bytes."""
        if self._may_give_up(journal, target):
            journal.intent(journal.progress.step)
            journal.outcome(journal.progress.step, Event.FAILED, reason, {"blame": False})
            drive(journal, target, self.follower, within)

    def _await(self, journal: Journal) -> None:
        """The new updater drives on by itself. Raises ReleaseError when it went back, or does not end."""
        clock, state = self.kit.clock, journal.progress.state
        end = clock.monotonic() + self.kit.settings.trial.lease_s * 2 + SETTLE_S
        while clock.monotonic() < end:
            progress = self._read(journal)
            if progress is not None and progress.state is not state:
                state = progress.state
                self.follower.changed(progress)
            if progress is not None and progress.state is State.CONFIRMED:
                return
            if progress is not None and progress.finished:
                raise _reverted(progress)
            self.kit.sleep(LOOK_S)
        text = f"the new updater has not come to an end: it is at {state.value}, and goes on by itself"
        raise MachineError("no-end", text)

    def _read(self, journal: Journal) -> Progress | None:
        tx = journal.progress.begin.tx
        return next((j.progress for j in self.journals.read_all() if j.progress.begin.tx == tx), None)


def _reverted(end: Progress) -> InstarError:
    reason = end.reason or Reason("reverted", "it was put back")
    return ReleaseError(reason.code, f"{end.begin.line} {end.begin.version} was put back: {reason.text}")
