"""The updater's rounds: finish what is open, ask what is wanted, drive what is needed, wait to be woken."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import uuid
from collections.abc import Callable
from dataclasses import replace

from instar.core import held, quarantine
from instar.core.backoff import Backoff
from instar.core.errors import InputError, InstarError, MachineError
from instar.core.journal import Begin, Progress, Reason
from instar.core.modules import PREFIX
from instar.core.releases import Release
from instar.core.settings import UpdaterSettings
from instar.core.transaction import State
from instar.core.wish import NATIVE, RECOVERY, Wanted, Wish, after_failures
from instar.engine.driver import BEFORE_ACTIVATION, Follower, abandon, drive, is_passive
from instar.engine.journal import Journal, Journals
from instar.engine.target import NotNow
from instar.host.alarm import within
from instar.host.clock import Clock
from instar.host.incoming import Incoming
from instar.host.layout import Layout
from instar.host.line import Line
from instar.host.records import read_held, read_quarantine, write_held
from instar.targets.line import LineTarget
from instar.targets.parcels import WAITS
from instar.updater.client import ARTIFACTS, ServerClient
from instar.updater.orders import Orders, Pushed
from instar.updater.targets import Targets
from instar.updater.tidy import tidy, tidy_parcels

KEPT_JOURNALS = 50
OLDEST_S = 86400.0  # for a transaction that has not been activated
BROUGHT_S = 900.0  # for one whose bytes only its maker can bring, until they are staged
CHECKED_S = 3600.0  # between two looks at all files of a module, which may be many

log = logging.getLogger("instar.updater")


class Told:
    """A follower that lets other threads know how far the transaction is, and then tells the next one."""

    def __init__(self, orders: Orders, further: Follower) -> None:
        self._orders, self._further = orders, further

    def changed(self, progress: Progress) -> None:
        if not progress.finished:
            self._orders.reached(progress.step.value)
        self._further.changed(progress)


class Loop:
    def __init__(
        self,
        layout: Layout,
        clock: Clock,
        targets: Targets,
        client: ServerClient,
        follower: Follower,
        settings: UpdaterSettings,
        orders: Orders,
    ) -> None:
        self.layout, self.clock, self.targets, self.client = layout, clock, targets, client
        self.follower, self.settings, self.orders = Told(orders, follower), settings, orders
        self.journals = Journals(layout.journal, clock)
        self._generations: dict[str, int] = {}  # of the wishes as they were last heard
        self._heard = False  # whether any were
        self._trouble = ""  # why the last try got no further, for the server
        self._checked: dict[str, tuple[str, float]] = {}  # modules' releases that were whole, and when
        self._retry_s = math.inf  # until a wish that waits after a failure may be tried again
        self._put_off: list[str] = []  # modules whose trouble this round went past
        self.backoff = Backoff(settings.retry_floor_s, 2.0, settings.retry_cap_s)

    def round(self) -> float:
        """Do all there is to do. Returns the seconds until the next round is due.

        Raises HandOver when this process must become another release.
        """
        self._retry_s = math.inf
        self._put_off = []
        try:
            tidy(self.layout, self.journals, self.targets)
            if self.orders.waiting():  # before what may wait long, for the server or for a parcel
                self._drive_open(active_only=True, ordered=True)
                self._obey()
            self._drive_open(active_only=True)
            self._obey()
            wanted = self._ask()
            self._give_up_unwanted(wanted)
            for modules in (False, True):  # a module never keeps the programs waiting
                self._drive_open(active_only=False, modules=modules)
                for wish in wanted.wishes:
                    if _is_module(wish.line) is modules:
                        self._apart(wish.line, lambda wish=wish: self._fulfil(wish, wanted))  # type: ignore[misc]
            self._retire_unwanted(wanted)
            self.journals.prune(KEPT_JOURNALS)
            tidy_parcels(self.layout, self.clock, self.journals, wanted, self.targets, self.orders)
        except NotNow as later:
            log.warning("later: %s", later.reason.text)
            self._trouble = ARTIFACTS if later.reason.code == ARTIFACTS else self._trouble
            return self.backoff.next(random.random())
        except InstarError as error:
            log.warning("%s", error.text)
            return self.backoff.next(random.random())
        if self._put_off:
            return self.backoff.next(random.random())
        self.backoff.reset()
        return min(self._retry_s, (self.settings.poll_s or wanted.poll_s) * random.uniform(0.9, 1.1))

    def wait(self, seconds: float) -> bool:
        """Wait to be woken, at most `seconds`; whether there is something to do. An order that comes just
        as the wait ends counts too: who leaves when idle must not take it along."""
        woken = self.orders.wake.wait(seconds)
        self.orders.wake.clear()
        return woken or self.orders.waiting()

    def _ask(self) -> Wanted:
        """What the server wants; a newer wish ends what was held against older ones."""
        wanted = self.client.wanted(self._trouble)
        self._trouble, self._heard = "", True
        self._generations = {wish.line: wish.generation for wish in wanted.wishes}
        before = read_held(self.layout.held)
        left = held.heard(before, self._generations)
        if left != before:
            write_held(self.layout.held, left)
        return wanted

    # --- one transaction

    def _drive(self, journal: Journal) -> State:
        begin = journal.progress.begin
        self.orders.begin(begin.tx, "" if journal.progress.finished else journal.progress.step.value)
        try:
            end = drive(journal, self.targets.of(begin.line), self.follower, within)
        finally:
            self.orders.end()
        why = f": {end.reason.text}" if end.reason else ""
        log.info("%s %s %s%s", begin.line, begin.version, end.state.value, why)
        return end.state

    def _drive_open(self, active_only: bool, modules: bool = True, ordered: bool = False) -> None:
        """Go on with what is open: what is active, or needs no server, before anything else. `ordered`: an
        operator's order waits, and only what is active goes before it."""
        for journal in self._unfinished():
            begin = journal.progress.begin
            if _is_module(begin.line) and not modules:
                continue
            if active_only and begin.cause == "wish" and journal.progress.state in BEFORE_ACTIVATION:
                continue
            if ordered and is_passive(journal.progress, self.targets.of(begin.line)):
                continue
            if self._too_old(journal):
                abandon(journal, self.targets.of(begin.line), _reason_too_old(_oldest_s(journal.progress)))
            self._apart(begin.line, lambda journal=journal: self._drive(journal))  # type: ignore[misc]

    def _unfinished(self) -> list[Journal]:
        """What is open, of lines that this release knows: the node's own programs first, then modules."""
        found = []
        for journal in self.journals.unfinished():
            try:
                self.targets.of(journal.progress.begin.line)
            except InputError as error:
                log.warning("%s is left alone: %s", journal.progress.begin.tx, error.text)
            else:
                found.append(journal)
        return sorted(found, key=lambda journal: _is_module(journal.progress.begin.line))

    def _apart(self, line: str, do: Callable[[], object]) -> None:
        """A module's trouble is put off, and holds up nobody else; the programs' ends the round, unless it
        is only that a parcel has not come yet."""
        if not _is_module(line):
            try:
                do()
            except NotNow as later:
                if later.reason.code != WAITS:
                    raise
                log.info("%s: %s", line, later.reason.text)
                self._put_off.append(line)
            return
        try:
            do()
        except NotNow as later:
            log.warning("%s: later: %s", line, later.reason.text)
        except InstarError as error:
            log.warning("%s: %s", line, error.text)
        else:
            return
        self._put_off.append(line)

    def _too_old(self, journal: Journal) -> bool:
        began = journal.progress.began
        now = self.clock.boottime()
        return began.boot_id == self.clock.boot_id() and now - began.boottime > _oldest_s(journal.progress)

    def _give_up_unwanted(self, wanted: Wanted) -> None:
        """End what was begun for a wish that is no longer there, unless it is active already."""
        digests = {wish.line: wish.release.digest for wish in wanted.wishes}
        for journal in self._unfinished():
            begin = journal.progress.begin
            if begin.cause == "wish" and digests.get(begin.line) != begin.digest:
                self._end(journal, Reason("superseded", "the server wants another release by now"))

    def _give_up(self, role: str, why: str) -> None:
        """End what was begun on a line for which an operator orders something else: it would work from a
        wrong origin."""
        for journal in self._unfinished():
            if journal.progress.begin.line == role:
                self._end(journal, Reason("superseded", why))

    def _end(self, journal: Journal, reason: Reason) -> None:
        line = journal.progress.begin.line
        if abandon(journal, self.targets.of(line), reason):
            self._apart(line, lambda: self._drive(journal))

    def _retire_unwanted(self, wanted: Wanted) -> None:
        """End the modules that the server, which has just said what it wants, does not name any more."""
        lines = {wish.line for wish in wanted.wishes}
        lines |= {journal.progress.begin.line for journal in self.journals.unfinished()}
        for module in self.targets.modules():
            if module.role not in lines and module.line.current():
                log.info("%s: %s is no longer wanted", module.role, module.line.current())
                self._apart(module.role, module.retire)

    # --- new ones

    def _fulfil(self, wish: Wish, wanted: Wanted) -> None:
        line = self.targets.of(wish.line).line
        current = line.current()
        anew = current == wish.release.name
        if self._is_sound(wish, line) if anew else wish.via == RECOVERY:
            return  # there is nothing to do, or a recovery core does it
        if wish.line in self._put_off:
            return  # what was put off is open still, and goes first: two at once would undo each other
        if self._is_held(wish.line, current) or self._kept_out(wish):
            return
        if self._waits_for_updater(wish, wanted) or self._too_soon(wish):
            return
        # Neither a parcel nor a core comes to a node that says it has it: what is damaged is fetched.
        via = "" if anew else wish.via
        if via == NATIVE and self._parcel_is_absent(wish):
            return
        log.info("%s: from %s to %s", wish.line, current or "nothing", wish.release.name)
        begin = self._begin(line, wish.line, wish.release, "wish")
        begin = replace(begin, target=wish.target, generation=wish.generation, via=via)
        if self._drive(self.journals.begin(begin)) is State.REVERTED:
            self._too_soon(wish)  # so that the next round comes as soon as it may be tried again

    def _is_sound(self, wish: Wish, line: Line) -> bool:
        """Whether the files of what is current are what was signed. A program's are looked at each time."""
        name, now = wish.release.name, self.clock.boottime()
        release, at = self._checked.get(wish.line, ("", -math.inf))
        if _is_module(wish.line) and release == name and 0 <= now - at < CHECKED_S:
            return True
        if line.is_valid(name):
            self._checked[wish.line] = (name, now)
            return True
        log.warning("%s: %s is damaged, and put there anew", wish.line, name)
        return False

    def _is_held(self, line: str, current: str) -> bool:
        hold = held.keeps(read_held(self.layout.held), line, current)
        if hold is not None:
            log.info("%s %s was pushed by an operator, and stays until there is a newer wish", line, current)
        return hold is not None

    def _parcel_is_absent(self, wish: Wish) -> bool:
        parcel = Incoming(self.layout.incoming).find(wish.line, wish.release.digest)
        name = wish.release.name
        if parcel is None and not self.targets.of(wish.line).line.is_valid(name):
            log.info("%s: %s is to come through the channel, and has not come yet", wish.line, name)
            return True
        return False

    def _kept_out(self, wish: Wish) -> bool:
        entries = read_quarantine(self.layout.quarantine)
        name = quarantine.key(wish.line, wish.release.digest)
        entry = quarantine.keeps_out(entries, name, self.clock.wall(), wish.generation)
        if entry is not None:
            log.info("%s %s is in quarantine: %s", wish.line, wish.release.version, entry.reason.text)
        return entry is not None

    def _too_soon(self, wish: Wish) -> bool:
        """After failures that were not the release's fault (no space, say), each next try waits longer."""
        ends: list[float] = []
        for journal in self.journals.read_all():
            progress = journal.progress
            begin = progress.begin
            same = (begin.line, begin.digest) == (wish.line, wish.release.digest)
            if same and begin.generation >= wish.generation:  # an operator who wishes anew need not wait
                ends = [*ends, journal.records[-1].at.wall] if _failed_blameless(progress) else []
        if not ends:
            return False
        left_s = ends[-1] + after_failures(len(ends)) - self.clock.wall()
        if 0 < left_s <= after_failures(len(ends)):  # a clock that went back makes nobody wait
            self._retry_s = min(self._retry_s, left_s)
            return True
        return False

    def _waits_for_updater(self, wish: Wish, wanted: Wanted) -> bool:
        """The updater goes first: a release that it could not take is not given to the agent. One that it
        is not to take, since an operator has pushed another, waits for nobody."""
        if wish.line != "agent" or self._is_held("updater", self.targets.of("updater").line.current()):
            return False
        return any(
            w.line == "updater"
            and w.release == wish.release
            and self.targets.of("updater").line.current() != w.release.name
            for w in wanted.wishes
        )

    def _obey(self) -> None:
        """Do what an operator has ordered, if anything."""
        self._rollback()
        self._push()

    def _rollback(self) -> None:
        """Do the rollback that was asked for, if one was."""
        role, tx = self.orders.take_rollback()
        if not role:
            return
        try:
            target = self.targets.of(role)
            release = previous_release(target)
            self._give_up(role, "an operator went back to the previous release")
            log.info("%s: back to %s, as asked", role, release.name)
            begin = self._begin(target.line, role, release, "rollback", tx)
            # So that the wish that was given up by this does not come back, but a newer one does.
            generation = self._generations.get(role, 0)
            journal = self.journals.begin(replace(begin, generation=generation))
        except InputError:
            self.orders.settled(tx)  # there is nothing to go back to by now
            raise
        except (MachineError, NotNow):
            self.orders.end()
            self.orders.leave_again(rollback=(role, tx))
            raise
        finally:
            self.orders.end()
        self.orders.settled(tx)
        self._drive(journal)

    def _push(self) -> None:
        """Install the release that an operator has pushed, if one has."""
        pushed = self.orders.take_pushed()
        if pushed is None:
            return
        try:
            begin = self._begin_push(pushed)
            self._give_up(pushed.line, "an operator pushed another release")
            log.info("%s: %s, pushed by an operator", pushed.line, begin.release.name)
            journal = self.journals.begin(begin)
        except InputError:
            self.orders.settled(pushed.tx)
            raise
        except (MachineError, NotNow):
            self.orders.end()
            self.orders.leave_again(pushed)
            raise
        finally:
            self.orders.end()
        self.orders.settled(pushed.tx)
        self._apart(pushed.line, lambda: self._drive(journal))

    def _begin_push(self, pushed: Pushed) -> Begin:
        """What the push goes against is asked for, if nothing was heard yet: without a server it holds
        against the first wish that is heard."""
        if not self._heard:
            with contextlib.suppress(InstarError):
                self._ask()
        against = self._generations.get(pushed.line, 0) if self._heard else held.UNHEARD
        line, release = self.targets.of(pushed.line).line, Release(pushed.version, pushed.digest)
        begin = self._begin(line, pushed.line, release, "push", pushed.tx)
        generation = max(against, pushed.generation_floor or against)
        return replace(begin, target=pushed.target, generation=generation, via="push")

    def _begin(self, line: Line, role: str, release: Release, cause: str, tx: str = "") -> Begin:
        tx = tx or f"tx-{uuid.uuid4().hex[:16]}"
        return Begin(tx, role, release.version, release.digest, "", line.current(), line.previous(), cause)


def previous_release(target: LineTarget) -> Release:
    """What a rollback goes to. Raises InputError `nothing-to-roll-back-to`."""
    line = target.line
    name = line.previous()
    if not name or name == line.current() or not line.is_valid(name):
        text = (
            f"cannot roll back the {target.role}: there is no valid previous release beside {line.current()}"
        )
        raise InputError("nothing-to-roll-back-to", text)
    return target.release_of(name)


def _is_module(line: str) -> bool:
    return line.startswith(PREFIX)


def _failed_blameless(progress: Progress) -> bool:
    """Whether it was put back although nothing is wrong with the release."""
    superseded = progress.reason is not None and progress.reason.code == "superseded"
    return progress.state is State.REVERTED and not progress.data.get("blame", True) and not superseded


def _oldest_s(progress: Progress) -> float:
    brought = progress.begin.cause in ("push", "recovery") and progress.state is State.OFFERED
    return BROUGHT_S if brought else OLDEST_S


def _reason_too_old(within_s: float) -> Reason:
    return Reason("too-old", f"it could not be activated within {within_s / 3600:g} h")
