"""Drives transactions: what is open goes on, what is no longer wanted is given up, trouble has its borders."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable

from instar.core.errors import InputError, InstarError, MachineError
from instar.core.journal import Begin, Moment, Progress, Reason, Record
from instar.core.modules import PREFIX
from instar.core.releases import Release
from instar.core.system import LINE as SYSTEM
from instar.core.transaction import State
from instar.core.wish import Wanted
from instar.engine.driver import BEFORE_ACTIVATION, Follower, abandon, drive, is_passive
from instar.engine.journal import Journal, Journals
from instar.engine.target import NotNow, Target
from instar.host.alarm import within
from instar.host.clock import Clock
from instar.host.line import Line
from instar.targets.parcels import WAITS
from instar.updater.orders import Orders
from instar.updater.targets import Targets

# Trouble of a system in these holds up nobody. The last two have no way back, and what stops them may last: a boot
# order that nobody can write. Else no other line begins between a system's switch and its end; here that rule gives
# way, for the repair may be what comes by the other lines. The first stands here only where the switch did not happen.
HOLDS_UP_NOBODY = (State.REHEARSED, State.CONFIRMING, State.REVERTING)
OLDEST_S = 86400.0  # for a transaction that has not been activated
BROUGHT_S = 900.0  # for one whose bytes only its maker can bring, until they are staged
ELSEWHERE_S = (
    3600.0  # for a system that nobody but its maker can take back, or whose bytes are not the server's
)

log = logging.getLogger("instar.updater")


class Told:
    """A follower that lets other threads know how far the transaction is, and then tells the next one."""

    def __init__(self, orders: Orders, further: Follower) -> None:
        self._orders, self._further = orders, further

    def changed(self, progress: Progress) -> None:
        if not progress.finished:
            self._orders.reached(progress.step.value)
        self._further.changed(progress)


class Driving:
    """`put_off` are the lines whose trouble this round went past."""

    def __init__(
        self, clock: Clock, journals: Journals, targets: Targets, follower: Follower, orders: Orders
    ) -> None:
        self.clock, self.journals, self.targets, self.orders = clock, journals, targets, orders
        self._follower = Told(orders, follower)
        self.put_off: list[str] = []
        self._unopened: list[tuple[Journal, Reason]] = []  # of the last look, and why

    def begin(self, line: Line, role: str, release: Release, cause: str, tx: str = "") -> Begin:
        """The facts of a transaction that begins now; they are in no journal yet."""
        tx = tx or f"tx-{uuid.uuid4().hex[:16]}"
        return Begin(tx, role, release.version, release.digest, "", line.current(), line.previous(), cause)

    def drive(self, journal: Journal, target: Target | None = None) -> State:
        """To its end, as far as it goes now. `target` stands in for the line's own. Raises NotNow, HandOver and
        whatever the engine's drive raises."""
        begin = journal.progress.begin
        self.orders.begin(begin.tx, "" if journal.progress.finished else journal.progress.step.value)
        try:
            end = drive(journal, target or self.targets.any(begin.line), self._follower, within)
        finally:
            self.orders.end()
        why = f": {end.reason.text}" if end.reason else ""
        log.info("%s %s %s%s", begin.line, begin.version, end.state.value, why)
        return end.state

    def drive_open(self, active_only: bool, modules: bool = True, ordered: bool = False) -> None:
        """Go on with what is open: what is active, or needs no server, before anything else. `ordered`: an
        operator's order waits, and only what is active goes before it. A system that is still being brought
        here is left for `System.round`: it comes last."""
        unfinished = self.unfinished()
        self._hold_unopened()
        for journal in unfinished:
            begin = journal.progress.begin
            if is_module(begin.line) and not modules:
                continue
            waits = journal.progress.state in BEFORE_ACTIVATION and not self._is_switched(journal.progress)
            if waits and (
                (active_only and begin.cause == "wish")
                or (begin.line == SYSTEM and begin.cause != "rollback")
            ):
                continue
            if ordered and is_passive(journal.progress, self.targets.any(begin.line)):
                continue
            self.go_on(journal)

    def go_on(self, journal: Journal) -> None:
        """With one that is open. A system that this round went past is tried again in the next one."""
        line = journal.progress.begin.line
        if line == SYSTEM and line in self.put_off:
            return
        if self._too_old(journal):
            abandon(journal, self.targets.any(line), _reason_too_old(journal))
        self._apart(journal)

    def _apart(self, journal: Journal) -> None:
        """Drive it; a system that is decided, and cannot be brought to its end now, is put off."""
        line = journal.progress.begin.line
        try:
            self.apart(line, lambda: self.drive(journal))
        except (NotNow, InstarError) as error:
            if line != SYSTEM or journal.progress.state not in HOLDS_UP_NOBODY:
                raise
            reason = error.reason if isinstance(error, NotNow) else error
            log.warning("%s: later: %s", line, reason.text)
            self.put_off.append(line)

    def unfinished(self) -> list[Journal]:
        """What is open, of lines that this release knows: the node's own programs and system first, then modules.

        Slots that cannot be used now are looked at again soon, and hold up nobody but in a trial (`unopened.py`)."""
        found: list[Journal] = []
        self._unopened = []
        for journal in self.journals.unfinished():
            try:
                self.targets.any(journal.progress.begin.line)
            except (InputError, MachineError) as error:
                log.warning("%s is left alone: %s", journal.progress.begin.tx, error.text)
                if journal.progress.begin.line == SYSTEM:
                    self._unopened.append((journal, Reason(error.code, error.text)))
                if isinstance(error, MachineError):
                    self.put_off.append(journal.progress.begin.line)
            else:
                found.append(journal)
        return sorted(found, key=lambda journal: is_module(journal.progress.begin.line))

    def _hold_unopened(self) -> None:
        """A system on trial whose slots cannot be opened: nothing else begins, until it is left."""
        for journal, why in self._unopened:
            from instar.updater.unopened import hold

            hold(journal, self.clock, why, lambda: self.targets.system().restart())

    def apart(self, line: str, do: Callable[[], object]) -> None:
        """A module's trouble is put off, and holds up nobody else; the programs' ends the round, unless it
        is only that a parcel has not come yet."""
        if not is_module(line):
            try:
                do()
            except NotNow as later:
                if later.reason.code != WAITS:
                    raise
                log.info("%s: %s", line, later.reason.text)
                self.put_off.append(line)
            return
        try:
            do()
        except NotNow as later:
            log.warning("%s: later: %s", line, later.reason.text)
        except InstarError as error:
            log.warning("%s: %s", line, error.text)
        else:
            return
        self.put_off.append(line)

    # --- giving up

    def give_up_unwanted(self, wanted: Wanted) -> None:
        """End what was begun for a wish that is no longer there, unless it is active already."""
        digests = {wish.line: wish.release.digest for wish in wanted.wishes}
        for journal in self.unfinished():
            begin = journal.progress.begin
            if begin.line == SYSTEM:
                unwanted = not wanted.fault and begin.generation != (
                    wanted.system and wanted.system.generation
                )
            else:
                unwanted = digests.get(begin.line) != begin.digest
            if begin.cause == "wish" and unwanted:
                self._end(journal, Reason("superseded", "the server wants another release by now"))

    def give_up(self, role: str, why: str) -> None:
        """End what was begun on a line for which an operator orders something else: it would work from a
        wrong origin."""
        for journal in self.unfinished():
            if journal.progress.begin.line == role:
                self._end(journal, Reason("superseded", why))

    def _end(self, journal: Journal, reason: Reason) -> None:
        line = journal.progress.begin.line
        if abandon(journal, self.targets.any(line), reason):
            self._apart(journal)

    def _is_switched(self, progress: Progress) -> bool:
        """Whether the power went while the firmware was being asked for the other system: what runs may be that,
        perhaps without a network, and its trial must begin."""
        left = progress.begin.line == SYSTEM and progress.data.get("left_boot")
        return bool(left) and left != self.clock.boot_id()

    def _too_old(self, journal: Journal) -> bool:
        return _age_s(journal.records, self.clock) > _oldest_s(journal.progress)


def is_module(line: str) -> bool:
    return line.startswith(PREFIX)


def _age_s(records: list[Record], clock: Clock) -> float:
    """How long it has been open while the machine ran, in seconds of boot time: since it began, and of each boot that
    came later from its start to the last record in it, of this one to now.

    A container's clock goes on through its boots. Of an earlier one only what its records span is known then.
    """
    now = Moment(clock.boot_id(), clock.boottime(), 0.0)
    since, until, last = {records[0].at.boot_id: records[0].at.boottime}, dict[str, float](), 0.0
    if now.boot_id not in since:
        since[now.boot_id] = clock.booted()
    for at in (*(record.at for record in records), now):
        since.setdefault(at.boot_id, at.boottime if at.boottime >= last else 0.0)
        until[at.boot_id] = last = max(until.get(at.boot_id, 0.0), at.boottime)
    return sum(until[boot_id] - since[boot_id] for boot_id in until)


def _oldest_s(progress: Progress) -> float:
    begin = progress.begin
    if progress.state is State.OFFERED and begin.via in ("push", "recovery"):
        return BROUGHT_S
    if progress.state is State.OFFERED and begin.line == SYSTEM and (begin.source or begin.cause == "push"):
        return ELSEWHERE_S
    return OLDEST_S


def _reason_too_old(journal: Journal) -> Reason:
    """With what stood in the way last."""
    last = next((record.reason.text for record in reversed(journal.records) if record.reason), "")
    text = f"it could not be activated within {_oldest_s(journal.progress) / 3600:g} h"
    return Reason("too-old", f"{text}: {last}" if last else text)
