"""The updater's rounds: finish what is open, ask what is wanted, drive what is needed, wait to be woken."""

from __future__ import annotations

import logging
import math
import random
from dataclasses import replace

from instar.core import held, quarantine
from instar.core.backoff import Backoff
from instar.core.errors import InputError, InstarError
from instar.core.journal import Progress
from instar.core.settings import UpdaterSettings
from instar.core.transaction import State
from instar.core.wish import NATIVE, RECOVERY, Wanted, Wish, after_failures
from instar.engine.driver import Follower
from instar.engine.journal import Journals
from instar.engine.target import NotNow
from instar.host.clock import Clock
from instar.host.incoming import Incoming
from instar.host.layout import Layout
from instar.host.line import Line
from instar.host.records import read_config, read_held, read_quarantine
from instar.updater.client import ARTIFACTS, ServerClient
from instar.updater.driving import Driving, is_module
from instar.updater.heard import Heard
from instar.updater.ordered import Ordered
from instar.updater.orders import Orders
from instar.updater.targets import Targets
from instar.updater.tidy import tidy, tidy_parcels

KEPT_JOURNALS = 50
SLOW = "slow"  # a turn of a long transfer has ended
CHECKED_S = 3600.0  # between two looks at all files of a module, which may be many

log = logging.getLogger("instar.updater")


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
        self.layout, self.clock, self.targets = layout, clock, targets
        self.settings, self.orders = settings, orders
        self.journals = Journals(layout.journal, clock)
        self.driving = Driving(clock, self.journals, targets, follower, orders)
        self.heard = Heard(client, layout.held)
        self.ordered = Ordered(self.driving, self.heard)
        self._checked: dict[str, tuple[str, float]] = {}  # modules' releases that were whole, and when
        self._retry_s = math.inf  # until a wish that waits after a failure may be tried again
        self.backoff = Backoff(settings.retry_floor_s, 2.0, settings.retry_cap_s)

    def round(self) -> float:
        """Do all there is to do. Returns the seconds until the next round is due.

        Raises HandOver when this process must become another release.
        """
        self._retry_s = math.inf
        self.driving.put_off = []
        try:
            wanted = self._do_all()
        except NotNow as later:
            log.warning("later: %s", later.reason.text)
            self.heard.trouble = ARTIFACTS if later.reason.code == ARTIFACTS else self.heard.trouble
            if later.reason.code == SLOW:  # it got on, and goes on once others had their turn
                self.backoff.reset()
            return self.backoff.next(random.random())
        except InstarError as error:
            log.warning("%s", error.text)
            return self.backoff.next(random.random())
        if self.driving.put_off:
            return self.backoff.next(random.random())
        self.backoff.reset()
        return min(self._retry_s, (self.settings.poll_s or wanted.poll_s) * random.uniform(0.9, 1.1))

    def _do_all(self) -> Wanted:
        driving = self.driving
        tidy(self.layout, self.journals, self.targets)
        if self.orders.waiting():  # before what may wait long, for the server or for a parcel
            driving.drive_open(active_only=True, ordered=True)
            self.ordered.obey()
        driving.drive_open(active_only=True)
        self.ordered.obey()
        wanted = self.heard.ask()
        driving.give_up_unwanted(wanted)
        for modules in (False, True):  # a module never keeps the programs waiting
            driving.drive_open(active_only=False, modules=modules)
            for wish in wanted.wishes:
                if is_module(wish.line) is modules:
                    driving.apart(wish.line, lambda wish=wish: self._fulfil(wish, wanted))  # type: ignore[misc]
        self._retire_unwanted(wanted)
        self._system(wanted)
        self.journals.prune(KEPT_JOURNALS)
        tidy_parcels(self.layout, self.clock, self.journals, wanted, self.targets, self.orders)
        return wanted

    def wait(self, seconds: float) -> bool:
        """Wait to be woken, at most `seconds`; whether there is something to do. An order that comes just
        as the wait ends counts too: who leaves when idle must not take it along."""
        woken = self.orders.wake.wait(seconds)
        self.orders.wake.clear()
        return woken or self.orders.waiting()

    def _retire_unwanted(self, wanted: Wanted) -> None:
        """End the modules that the server, which has just said what it wants, does not name any more."""
        lines = {wish.line for wish in wanted.wishes}
        lines |= {journal.progress.begin.line for journal in self.journals.unfinished()}
        for module in self.targets.modules():
            if module.role not in lines and module.line.current():
                log.info("%s: %s is no longer wanted", module.role, module.line.current())
                self.driving.apart(module.role, module.retire)

    def _system(self, wanted: Wanted) -> None:
        """Line `os` comes last. A node without slots pays for it only when somebody wants something of them."""
        wants = wanted.system or wanted.cold_boot or wanted.fault or self.orders.update
        if self.targets.has_slots or wants:
            due_s = self.targets.system().round(wanted, self.driving)
            self._retry_s = min(self._retry_s, due_s)

    # --- new ones

    def _fulfil(self, wish: Wish, wanted: Wanted) -> None:
        line = self.targets.of(wish.line).line
        current = line.current()
        anew = current == wish.release.name
        forced = anew and self._is_forced(wish)
        if not forced and (self._is_sound(wish, line) if anew else wish.via == RECOVERY):
            return  # there is nothing to do, or a recovery core does it
        if wish.line in self.driving.put_off:
            return  # what was put off is open still, and goes first: two at once would undo each other
        if self._is_held(wish.line, current) or self._kept_out(wish):
            return
        if self._waits_for_updater(wish, wanted) or self._too_soon(wish):
            return
        # Neither a parcel nor a core comes to a node that says it has it: what is damaged is fetched.
        via = "" if anew and not forced else wish.via
        if via == NATIVE and self._parcel_is_absent(wish):
            return
        log.info("%s: from %s to %s", wish.line, current or "nothing", wish.release.name)
        begin = self.driving.begin(line, wish.line, wish.release, "wish")
        begin = replace(begin, target=wish.target, generation=wish.generation, via=via)
        if self.driving.drive(self.journals.begin(begin)) is State.REVERTED:
            self._too_soon(wish)  # so that the next round comes as soon as it may be tried again

    def _is_forced(self, wish: Wish) -> bool:
        """Whether it is put there although it is current, from a parcel that has come: once for each wish."""
        if wish.via != NATIVE or not self._takes_all():
            return False
        if Incoming(self.layout.incoming).find(wish.line, wish.release.digest) is None:
            return False
        return wish.generation > self.journals.newest_generation(wish.line, wish.release.digest)

    def _takes_all(self) -> bool:
        """As the file says now, as for whoever receives the parcel; not in doubt."""
        try:
            return read_config(self.layout).native.mode == "force"
        except InputError:
            return False

    def _is_sound(self, wish: Wish, line: Line) -> bool:
        """Whether the files of what is current are what was signed. A program's are looked at each time."""
        name, now = wish.release.name, self.clock.boottime()
        release, at = self._checked.get(wish.line, ("", -math.inf))
        if is_module(wish.line) and release == name and 0 <= now - at < CHECKED_S:
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


def _failed_blameless(progress: Progress) -> bool:
    """Whether it was put back although nothing is wrong with the release."""
    superseded = progress.reason is not None and progress.reason.code == "superseded"
    return progress.state is State.REVERTED and not progress.data.get("blame", True) and not superseded
