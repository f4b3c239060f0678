"""What the machine has done by itself, noted at each start of the updater: what the firmware has started, and a first
system that nobody has installed.

What was seen is written down before anything is done about it: `booted_by` of the record first, then the order that
the firmware keeps, then `cold_boot_seen`. So a boot order that cannot be written (a full variable store), or a power
cut in between, never makes a system that the firmware has started look like one that it did not.
"""

from __future__ import annotations

from instar.core import quarantine
from instar.core.journal import Reason
from instar.core.releases import Release
from instar.engine.journal import Journal, Journals
from instar.host.boot.slots import Boot, other
from instar.host.points import reach
from instar.host.records import read_quarantine, write_quarantine
from instar.targets.kit import Kit
from instar.targets.slots.ledger import Ledger
from instar.targets.slots.platform import Platform
from instar.targets.slots.records import SlotRecord
from instar.targets.slots.trial import ROLE

UNSEEN = "confirmed, cold boot not seen"
LEFT = "left before a cold boot was seen"
FIRMWARE = "firmware"


def is_unseen(record: SlotRecord) -> bool:
    return record.state == "good" and not record.cold_boot_seen


def keep(boot: Boot, slot: str, proven: bool) -> None:
    """The next boots are of this slot: all of them, or one until the firmware is seen to start it."""
    if proven:
        boot.prefer(slot)
        return
    boot.prefer(other(slot), trying=True)
    reach("os:preferred-other")
    boot.try_once(slot)


def accuse(kit: Kit, release: Release, since: float, generation: int, reason: Reason) -> None:
    """Into quarantine. `since`: a failure that was written down after it is this one."""
    path = kit.layout.quarantine
    entries, name = read_quarantine(path), quarantine.key(ROLE, release.digest)
    old = entries.get(name)
    if old is not None and old.since >= since:
        return
    entries = quarantine.add(entries, name, release.version, reason, kit.clock.wall(), generation)
    write_quarantine(path, entries, kit.disk)


class Seen:
    """Caches nothing; each call may be repeated."""

    def __init__(self, kit: Kit, platform: Platform, ledger: Ledger) -> None:
        self._kit, self._platform, self._ledger = kit, platform, ledger

    def cold_boot(self) -> None:
        """A system that only kexec had started stays from now on, or is left for good if the other one came up in
        its place. Raises MachineError: to be done again."""
        running = self._platform.running()
        if not running:
            return
        by, records, beside = self._platform.booted_by(), self._ledger.records(), other(running)
        if is_unseen(records[running]):
            if by == FIRMWARE:
                self._stays(running)
            elif records[beside].has_run and self._ledger.usable(beside):
                keep(
                    self._platform.boot, running, proven=False
                )  # firmware that lost the entries is told again
        elif by == FIRMWARE and is_unseen(records[beside]) and records[beside].why != LEFT:
            if records[beside].booted_by != FIRMWARE:
                self._leave(beside, records[beside])
            elif self._ledger.usable(beside):
                self._stays(beside)  # the firmware had started it, and the order was not moved then

    def _stays(self, slot: str) -> None:
        try:
            self._ledger.mark(slot, booted_by=FIRMWARE)
        finally:  # a state folder that cannot be written: the order alone keeps it, too
            reach("os:seen")
            self._platform.boot.prefer(slot)
        reach("os:preferred")
        self._ledger.mark(slot, cold_boot_seen=True, why="")

    def _leave(self, slot: str, unseen: SlotRecord) -> None:
        reason = Reason("fell-back", f"slot {slot} was started by kexec, and never by the firmware")
        self._platform.boot.prefer(other(slot))
        accuse(self._kit, Release(unseen.version, unseen.digest), unseen.since, 0, reason)
        self._ledger.mark(slot, state="bad", why=reason.text)

    def adopt(self) -> None:
        """Note the version of a first system, and end a trial that no journal speaks of."""
        self._ledger.adopt()
        trials = [slot for slot, record in self._ledger.records().items() if record.state == "trial"]
        if trials and not any(each.progress.begin.line == ROLE for each in self._unfinished()):
            for slot in trials:
                self._ledger.mark(slot, state="unknown", why="the journal of its trial was lost")

    def _unfinished(self) -> list[Journal]:
        journals = Journals(self._kit.layout.journal, self._kit.clock, self._kit.disk).read_all()
        return [journal for journal in journals if not journal.progress.finished]
