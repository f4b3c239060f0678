"""The node's operating system, as the updater's rounds see it: line `os`, the last of all.

A wish, or an order of an operator, is begun once: what comes of it is for whoever wished to look at, and the next
one has another generation. A node whose slots cannot be used says so in a transaction that ends at once, and
goes on updating its programs.

Imported when there is something to do with it: a node without `[os]` pays nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import uuid
from collections.abc import Callable
from typing import Any

from instar.core.errors import InputError, InstarError, MachineError
from instar.core.journal import Begin, Progress, Reason
from instar.core.recovery import Observation
from instar.core.releases import Release, version_key
from instar.core.system import LINE, ColdBoot, SystemWish
from instar.core.wish import Wanted
from instar.engine.journal import Journal, Journals
from instar.engine.target import Failed, Notes, Outcome
from instar.host.boot.slots import other
from instar.host.files import make_folder, write_atomic
from instar.targets.kit import Kit
from instar.targets.os_slot import OsSlot
from instar.targets.slots.platform import Platform, SystemProgress
from instar.targets.slots.records import SlotRecord
from instar.updater.driving import Driving
from instar.updater.orders import Orders, Updating

NO_VERSION, NO_DIGEST = "0.0.0", "0" * 96  # of a system that nobody has named
MOST_DRIFT = 16  # lines that a report may have
COUNTING = "counting"  # as the protocol calls systemd-boot with its counting of tries

log = logging.getLogger("instar.updater")

Ask = Callable[[], Wanted]


def cannot_restart() -> None:
    raise MachineError("no-reboot", "cannot restart the machine: nobody here can")


class System:
    """`open_platform` looks at the machine, `ask` at what the server wants, for a second word before a switch;
    `tell` is called, from the thread that drives, when there is more to report; `restart` asks for the machine's way
    down, and needs no slots."""

    def __init__(
        self, kit: Kit, journals: Journals, orders: Orders, open_platform: Callable[[], Platform], ask: Ask,
        tell: Callable[[], None], restart: Callable[[], None] = cannot_restart,
    ) -> None:  # fmt: skip
        self.kit, self.journals, self.orders = kit, journals, orders
        self._open, self._ask, self._tell, self.restart = open_platform, ask, tell, restart
        self._slot: OsSlot | None = None
        self._lock = threading.Lock()
        self._fault: InstarError | None = None
        self._unlooked: InstarError | None = None  # why `_look` has not succeeded yet
        self._told: SystemProgress | None = None
        self._repaired: list[str] = []  # what was not as we had left it at this updater's start
        self._obeyed = kit.layout.system / "cold-boot.json"

    # --- the machine

    def slot(self) -> OsSlot:
        """The target of line `os`. Raises InputError `no-slots`, MachineError with why the slots cannot be used.

        What the machine has done by itself since the last updater is noted when it is first asked for.
        """
        with self._lock:
            if self._slot is None:
                try:
                    answer_s, waited = self.kit.settings.os.answer_s, self.orders.wake.is_set
                    slot = AskingSlot(self.kit, self._open(), answer_s, self._progress, waited)
                except InstarError as error:
                    if self._fault is None or self._fault.text != error.text:
                        log.warning("the system's slots cannot be used: %s", error.text)
                        self._fault = error
                        self._tell()
                    raise
                slot.ask = self._ask
                self._slot, self._fault = slot, None
                self._look(slot)
        return self._slot

    def _look(self, slot: OsSlot) -> None:
        """Each round does it again until it has succeeded once: what the firmware has started is seen in this boot
        alone."""
        before, found = self._unlooked, None
        try:
            slot.cold_boot_seen()
            slot.adopt()
            for done in slot.platform.boot.repair():
                log.warning("boot entries: %s", done)
                self._repaired.append(done)
        except (InstarError, OSError) as error:
            found = _as_instar(error)
            if before is None or before.text != found.text:
                log.warning("the slots' records or boot entries cannot be put in order: %s", found.text)
        self._unlooked = found
        if found is None or before is None:
            self._tell()

    def start(self) -> None:
        """At each start of the updater. Never fails."""
        try:
            self.slot()
        except InstarError:
            self._tell()

    def _progress(self, progress: SystemProgress) -> None:
        self._told = progress
        self.orders.brought(progress.done, progress.total)
        self._tell()

    # --- rounds

    def round(self, wanted: Wanted, driving: Driving) -> float:
        """Go on with what is open, then begin what is ordered or wanted, one at a time. Seconds until a cold boot
        is due. Raises as `Driving.drive` does."""
        if wanted.fault:
            log.warning("%s", wanted.fault)
        unlooked = self._unlooked
        with contextlib.suppress(InstarError):
            slot = self.slot()  # they may be there by now
            if unlooked is not None:
                self._look(slot)
        due_s = self._go_on(wanted, driving)
        if self._unlooked is not None and LINE not in driving.put_off:
            driving.put_off.append(LINE)  # so that the next round comes soon
        return due_s

    def _go_on(self, wanted: Wanted, driving: Driving) -> float:
        for journal in driving.unfinished():
            if journal.progress.begin.line == LINE:
                driving.go_on(journal)
        if LINE in driving.put_off:
            return math.inf
        if (ordered := self.orders.take_update()) is not None:
            self._obey(ordered, driving)
        wish = wanted.system
        if wish is not None and not self._is_done(wish.generation, ("wish", "rollback")):
            release = wish.release
            log.info("os: to %s, activated by %s", release.name, wish.mode)
            self._drive(self._begin(release, "wish", _facts(wish)), driving)
        return self._cold_boot(wanted.cold_boot, driving)

    def _obey(self, ordered: Updating, driving: Driving) -> None:
        try:
            begin = self._begin(Release(ordered.version, ordered.digest), "push", ordered.facts(), ordered.tx)
            log.info("os: to %s, activated by %s, as an operator ordered", begin.release.name, begin.mode)
            journal = self.journals.begin(begin)
        except MachineError:
            self.orders.leave_again(update=ordered)
            raise
        finally:
            self.orders.end()
        self.orders.settled(ordered.tx)
        self._drive(journal, driving)

    def _is_done(self, generation: int, causes: tuple[str, ...]) -> bool:
        """Whether a transaction was begun for this word of the server, or a newer one."""
        begins = [journal.progress.begin for journal in self.journals.read_all()]
        return any(
            begin.line == LINE and begin.cause in causes and begin.generation >= generation
            for begin in begins
        )

    def _drive(self, begun: Begin | Journal, driving: Driving) -> None:
        journal = self.journals.begin(begun) if isinstance(begun, Begin) else begun
        try:
            self.slot()
        except InstarError as error:
            driving.drive(journal, Refusing(error))
        else:
            driving.drive(journal)

    def _begin(self, release: Release, cause: str, facts: dict[str, Any], tx: str = "") -> Begin:
        running, beside = self._names()
        tx = tx or f"tx-{uuid.uuid4().hex[:16]}"
        return Begin(
            tx,
            LINE,
            release.version,
            release.digest,
            facts.pop("target", ""),
            running,
            beside,
            cause,
            **facts,
        )

    def _names(self) -> tuple[str, str]:
        """What runs and what lies beside it, '' where nobody knows."""
        try:
            slot = self.slot()
        except InstarError:
            return "", ""
        running = slot.platform.running()
        if not running:
            return "", ""
        records = slot.records()
        return records[running].name, records[other(running)].name

    # --- a proof of a cold boot

    def _cold_boot(self, order: ColdBoot | None, driving: Driving) -> float:
        if order is None or self._is_obeyed(order):
            return math.inf
        left_s = order.at - self.kit.clock.wall()
        if left_s > 0:
            return left_s
        log.info("os: a cold boot of what runs, as ordered")
        facts = {"mode": "reboot", "generation": order.generation}
        journal = self.journals.begin(self._begin(self._runs(), "cold-boot", facts))
        make_folder(self._obeyed.parent, 0o700)
        write_atomic(self._obeyed, json.dumps({"v": 1, "generation": order.generation}).encode(), 0o600)
        self._drive(journal, driving)
        return math.inf

    def _is_obeyed(self, order: ColdBoot) -> bool:
        try:
            if int(json.loads(self._obeyed.read_bytes())["generation"]) >= order.generation:
                return True
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return self._is_done(order.generation, ("cold-boot",))

    def _runs(self) -> Release:
        try:
            slot = self.slot()
            running = slot.platform.running()
            record = slot.records()[running] if running else SlotRecord()
        except InstarError:
            record = SlotRecord()
        try:
            return Release(record.version, record.digest)
        except InputError:
            return Release(record.version if _is_version(record.version) else NO_VERSION, NO_DIGEST)

    # --- the way back

    def begin_rollback(self, tx: str, generation: int) -> Begin:
        """Of an operator's word. Raises as `previous` does."""
        facts = {"mode": "reboot", "generation": generation}
        return self._begin(self.previous(), "rollback", facts, tx)

    def previous(self) -> Release:
        """What a rollback goes to. Raises InputError `nothing-to-roll-back-to`, and as `slot` does."""
        slot = self.slot()
        running = slot.platform.running()
        if not running:
            text = "cannot roll back the os: the mounted root lies on neither slot"
            raise MachineError("unknown-slot", text)
        record = slot.records()[other(running)]
        if not record.name or not slot.usable(other(running)):
            text = f"cannot roll back the os: slot {other(running)} holds no whole system beside the one that runs"
            raise InputError("nothing-to-roll-back-to", text)
        return Release(record.version, record.digest)

    # --- what is told

    def report(self) -> dict[str, Any]:
        """The body of POST /v1/node/system, and of GET /v1/system. For any thread. Raises MachineError when the
        journals cannot be read."""
        said: dict[str, Any] = {
            "v": 1, "running": "", "hardware": [], "arch": "", "backend": "", "slots": {}, "boot": {},
            "update": self._update(), "error": None,
        }  # fmt: skip
        slot, fault = self._slot, self._fault
        if slot is None:
            return {**said, "error": fault.as_json() if fault else None}
        try:
            self._say(slot, said)
        except (InstarError, OSError) as error:
            said["error"] = _as_instar(error).as_json()
        else:
            said["error"] = self._unlooked.as_json() if self._unlooked else None
        return said

    def _say(self, slot: OsSlot, said: dict[str, Any]) -> None:
        """As much as can be looked at now."""
        platform, backend = slot.platform, slot.platform.boot.name
        said |= {
            "running": platform.running(),
            "hardware": list(platform.hardware),
            "arch": platform.arch,
            "backend": COUNTING if backend != "firmware" else backend,
        }
        said["slots"] = {name: record._asdict() for name, record in slot.records().items()}
        state = platform.boot.state()
        drift = [*state.drift, *self._repaired][:MOST_DRIFT]
        said["boot"] = {"order": list(state.order), "once": state.once, "tries": state.tries, "drift": drift}

    def _update(self) -> dict[str, Any] | None:
        """The transaction of line `os` that is under way."""
        found = [journal for journal in self.journals.read_all() if _is_open(journal.progress)]
        if not found:
            return None
        progress, told = found[-1].progress, self._told
        begin, bytes_ = progress.begin, progress.data.get("bytes", {})
        done = {"slot": str(progress.data.get("slot", "")), "done": 0, "total": 0}
        done |= {"fetched": bytes_.get("fetched", 0), "reused": bytes_.get("reused", 0)}
        if told is not None and told.tx == begin.tx:
            done = told._asdict()
        return {**done, "tx": begin.tx, "generation": begin.generation, "step": progress.step.value}


class AskingSlot(OsSlot):
    """Asks the server once more, right before the machine is switched: an update that was cancelled meanwhile must
    not take a node down."""

    ask: Ask

    def activate(self, progress: Progress, notes: Notes) -> Outcome:
        begin = progress.begin
        if begin.cause == "wish" and not self._may_be_switched(progress):
            wanted = self.ask()  # ServerUnreachable: later, for without its server a trial cannot pass
            if not wanted.fault and (wanted.system is None or wanted.system.generation != begin.generation):
                raise Failed(Reason("superseded", "the server does not want it any more"), blame=False)
        return super().activate(progress, notes)

    def _may_be_switched(self, progress: Progress) -> bool:
        """Whether the machine went down since the firmware was asked, and what came up is not known to be the old
        system: a candidate without a network has nobody to ask, and must go on to its trial."""
        now = self.kit.clock.boot_id()
        if progress.data.get("left_boot", now) == now:
            return False
        return self.platform.running() != other(str(progress.data["slot"]))


class Refusing:
    """Stands for slots that cannot be used: whatever is begun ends at once, for that reason."""

    def __init__(self, why: InstarError) -> None:
        self._why = why

    def observe(self, progress: Progress) -> Observation:
        return Observation("")

    def stage(self, progress: Progress, notes: Notes) -> Outcome:
        raise Failed(Reason(self._why.code, self._why.text), blame=False)

    verify = rehearse = activate = watch = confirm = stage

    def revert(self, progress: Progress, notes: Notes) -> Outcome:
        return Outcome()


def _facts(wish: SystemWish) -> dict[str, Any]:
    return {
        "target": wish.target, "generation": wish.generation, "mode": wish.mode, "source": wish.source,
        "override": wish.override,
    }  # fmt: skip


def _is_open(progress: Progress) -> bool:
    return progress.begin.line == LINE and not progress.finished


def _as_instar(error: InstarError | OSError) -> InstarError:
    if isinstance(error, InstarError):
        return error
    return MachineError("machine", f"cannot look at the slots: {error.strerror or error}")


def _is_version(text: str) -> bool:
    try:
        version_key(text)
    except InputError:
        return False
    return True
