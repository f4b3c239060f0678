"""The node's operating system, as a thing that can be replaced: an image into the slot that does not run.

Staging and verifying are `slots/install.py`'s, the trial is `slots/trial.py`'s; going back to the other slot and
proving a cold boot write no image (`slots/ways.py`). Here is the switch: activating asks the firmware for one try
(or loads the kernel for kexec) and lets the machine go down in the watch, after the caller has had his answer.
What came up is known from the mounted root alone.

The order that the firmware keeps is moved only for a system that the firmware itself has started and that has
passed its trial. One that kexec has started is confirmed, and gets one try of the firmware at the next cold boot:
if it comes up, the order is moved then (`cold_boot_seen`); if not, the machine is back on the old one for good.
"""

from __future__ import annotations

import contextlib
from typing import Any

from instar.core.errors import MachineError
from instar.core.journal import Progress, Reason
from instar.core.lease import Lease
from instar.core.light import asdict
from instar.core.recovery import Observation
from instar.core.transaction import State, Step
from instar.engine.target import Failed, Notes, NotNow, Outcome
from instar.host.boot.slots import other
from instar.host.files import remove_tree
from instar.host.points import reach
from instar.targets.kit import Kit
from instar.targets.os_seen import LEFT, UNSEEN, Seen, accuse, is_unseen, keep
from instar.targets.slots.install import Install, Waited
from instar.targets.slots.ledger import Ledger
from instar.targets.slots.platform import Platform, Tell, untold
from instar.targets.slots.records import SlotRecord
from instar.targets.slots.trial import LOOK_S, SlotTrial, health
from instar.targets.slots.ways import CAUSES, COLD_BOOT, ROLLBACK, Ways

MODES = ("none", "reboot", "kexec")
DOWN_WITHIN_S = 300.0  # a machine that is not down by then does not go down
MOST_BACK = 3  # starts of the machine that are spent on the way back
NO_IMAGE = "no-kernel-image"  # as the ways of choosing a slot say it


class OsSlot:
    """Holds only what can be found out again. `answer_s`: from the activation to the machine's way down. `tell` is
    called while an image comes or is read back, a few times a second; `waited`: whether its transfer is to let others
    have a turn."""

    def __init__(
        self, kit: Kit, platform: Platform, answer_s: float = 10.0, tell: Tell = untold,
        waited: Waited = lambda: False,
    ) -> None:  # fmt: skip
        self.kit, self.platform, self.answer_s = kit, platform, answer_s
        self.ledger = Ledger(kit.layout.system, platform, kit.clock.wall, kit.disk)
        self._install = Install(kit, platform, self.ledger, tell, waited)
        self._ways = Ways(self._install)
        self._seen = Seen(kit, platform, self.ledger)

    # --- what is there

    def observe(self, progress: Progress) -> Observation:
        """Until the machine has gone down, the candidate counts as what would run next."""
        running, records = self.platform.running(), self.records()
        current = records[running].name if running else ""
        previous = records[other(running)].name if running else ""
        activated = progress.data.get("activated")
        if activated is None or progress.state is not State.TRIAL:
            return Observation(current, previous)
        if activated["mode"] == "none" or activated["boot_id"] == self.kit.clock.boot_id():
            return Observation(progress.begin.release.name, previous)
        if running != activated["slot"] and not self._is_untried(progress):
            text = f"slot {running or 'unknown'} came up in place of slot {activated['slot']}"
            return Observation(current, previous, Reason("fell-back", text))
        return Observation(progress.begin.release.name, previous)

    def records(self) -> dict[str, SlotRecord]:
        return self.ledger.records()

    def usable(self, slot: str) -> bool:
        """Whether it holds a whole system to go back to, as far as it is known."""
        return self.ledger.usable(slot)

    # --- bringing it there

    def stage(self, progress: Progress, notes: Notes) -> Outcome:
        if progress.begin.cause in CAUSES:
            return self._ways.stage(progress)
        return self._install.stage(progress)

    def verify(self, progress: Progress, notes: Notes) -> Outcome:
        if progress.begin.cause in CAUSES:
            return self._ways.verify(progress)
        return self._install.verify(progress)

    def rehearse(self, progress: Progress, notes: Notes) -> Outcome:
        """What can be tried without going down: the kernel is taken, the entries can be written."""
        mode, slot, boot = progress.begin.mode, str(progress.data["slot"]), self.platform.boot
        data: dict[str, Any] = {"mode": mode, "repaired": boot.repair()}
        if mode == "none":
            return Outcome(data)
        boot.prepare(slot)
        if mode != "kexec":
            return Outcome(data)
        refused = self._kexec_refused(progress, slot)
        if refused is not None:
            return Outcome({**data, "mode": "reboot"}, refused)
        watchdog = self.platform.watchdog
        watchdog.keep()
        data["watchdog"] = watchdog.across_kexec()
        if data["watchdog"] != "stops":
            return Outcome(data)
        text = (
            "kexec stops the watchdog (watchdog.stop_on_reboot is not 0): a kernel that hangs would stay hung"
        )
        return Outcome(data, Reason("watchdog-stops", text))

    def _kexec_refused(self, progress: Progress, slot: str) -> Reason | None:
        """Why it is to be a reboot in place of kexec."""
        denied = set(progress.data.get("deny_kexec", ())) & set(self.platform.hardware)
        if denied:
            text = f"the bundle denies kexec on {min(denied)}; rebooting in its place"
            return Reason("kexec-denied", text)
        try:
            self.platform.kexec.load(self.platform.boot.kernel(slot), slot)
            self.platform.kexec.unload()
        except MachineError as error:
            return Reason(error.code, f"{error.text}; rebooting in its place")
        return None

    # --- the switch

    def activate(self, progress: Progress, notes: Notes) -> Outcome:
        mode, slot, clock = str(progress.data["mode"]), str(progress.data["slot"]), self.kit.clock
        left_boot = str(progress.data.get("left_boot", clock.boot_id()))
        if "left_boot" not in progress.data:
            was = self.ledger.record(slot).state
            left = {
                "before": health(self.kit),
                "origin_slot": other(slot),
                "left_boot": left_boot,
                "was": was,
            }
            notes.note(left)
        if progress.begin.cause == COLD_BOOT and self.platform.running() != slot:
            text = f"slot {self.platform.running() or 'unknown'} came up in place of slot {slot}"
            raise Failed(Reason("fell-back", text))
        came_up = left_boot != clock.boot_id() and self.platform.running() == slot
        if mode != "none":  # before the firmware is asked: a guard of what comes up goes by it
            self._withdraw(other(slot))
            self.ledger.mark(slot, state="trial")
        if not came_up:  # it has where the power went right after the firmware had been asked
            self._ask_for(progress, mode, slot)
        reach("os:asked")
        wanted = self.kit.settings.trial
        lease = Lease(wanted.lease_s, wanted.cap_s, clock.boot_id(), clock.boottime())
        boot_id = left_boot if came_up else clock.boot_id()
        activated = {"mode": mode, "slot": slot, "boot_id": boot_id, "at": clock.boottime()}
        return Outcome({"activated": activated, "lease": asdict(lease)})

    def _ask_for(self, progress: Progress, mode: str, slot: str) -> None:
        if progress.begin.cause == COLD_BOOT:
            self.platform.boot.prefer(other(slot), trying=True)
            reach("os:preferred-other")
        if mode == "kexec":
            self.platform.kexec.load(self.platform.boot.kernel(slot), slot)
        elif mode == "reboot":
            self.platform.boot.try_once(slot)

    def _withdraw(self, origin: str) -> None:
        """The firmware will be asked for another slot than this one, which it was not seen to start: that it does not
        come up says nothing about it."""
        if is_unseen(self.ledger.record(origin)):
            self.ledger.mark(origin, why=LEFT)

    def watch(self, progress: Progress, notes: Notes) -> Outcome:
        activated = progress.data["activated"]
        if activated["mode"] == "none":
            return Outcome()
        if self._is_untried(progress):
            activated = self._load_again(activated, notes)
        if activated["boot_id"] == self.kit.clock.boot_id():
            self._go_down(activated, notes)
        by = self.platform.booted_by()
        self.ledger.mark(str(activated["slot"]), booted_by=by)
        SlotTrial(self.kit, progress, notes).watch()
        return Outcome({"booted_by": by})

    def _is_untried(self, progress: Progress) -> bool:
        """Whether the power went after the kernel was loaded for kexec, and before the machine went down for it: the
        firmware knows nothing of it, and started the old system."""
        activated = progress.data["activated"]
        gone = (
            activated["boot_id"] != self.kit.clock.boot_id() and self.platform.running() != activated["slot"]
        )
        return gone and activated["mode"] == "kexec" and not progress.data.get("down")

    def _load_again(self, activated: dict[str, Any], notes: Notes) -> dict[str, Any]:
        clock, slot = self.kit.clock, str(activated["slot"])
        self.platform.kexec.load(self.platform.boot.kernel(slot), slot)
        activated = {**activated, "boot_id": clock.boot_id(), "at": clock.boottime()}
        notes.note({"activated": activated, "left_boot": clock.boot_id()})
        return activated

    def _go_down(self, activated: dict[str, Any], notes: Notes) -> None:
        """Let the caller have his answer first, then the machine goes down: this process ends with it."""
        clock = self.kit.clock
        left = activated["at"] + self.answer_s - clock.boottime()
        if left > 0:
            self.kit.sleep(left)
        notes.note({"down": True})
        reach("os:down")
        self._down(str(activated["mode"]))
        text = f"the machine did not go down within {DOWN_WITHIN_S:g} s"
        raise Failed(Reason("not-down", text), blame=False)

    def _down(self, mode: str) -> None:
        power, clock = self.platform.power, self.kit.clock
        power.kexec() if mode == "kexec" else power.reboot()
        end = clock.boottime() + DOWN_WITHIN_S
        while clock.boottime() < end:
            self.kit.sleep(LOOK_S)

    # --- its end

    def confirm(self, progress: Progress, notes: Notes) -> Outcome:
        """The boot order is written and read back, if the firmware has started this system."""
        slot = str(progress.data["slot"])
        record = self.ledger.record(slot)
        if progress.data["activated"]["mode"] == "none":
            if record.state != "good":
                self.ledger.mark(slot, state="installed", why="installed, not active")
            return Outcome()
        here = self.platform.running() == slot
        seen = (progress.data.get("booted_by"), self.platform.booted_by() if here else "")
        proven = "firmware" in seen or record.cold_boot_seen
        if not here and self._is_left(progress):
            return self._leave(progress, slot)
        self._keep(slot, proven)
        reach("os:preferred")
        if not here:  # the power went right after the decision
            if "retried" not in progress.data:
                notes.note({"retried": self.kit.clock.boot_id()})
            self._down("reboot")
            raise NotNow(Reason("not-down", "the machine did not go down for the slot that was confirmed"))
        self.ledger.mark(slot, state="good", cold_boot_seen=proven, why="" if proven else UNSEEN)
        return Outcome()

    def _keep(self, slot: str, proven: bool) -> None:
        keep(self.platform.boot, slot, proven)

    def _is_left(self, progress: Progress) -> bool:
        """Whether the firmware was asked for what was confirmed, and another one came up: it is not asked for ever."""
        now = self.kit.clock.boot_id()
        return str(progress.data.get("retried", now)) != now

    def _leave(self, progress: Progress, slot: str) -> Outcome:
        reason = Reason(
            "fell-back", f"slot {slot} passed its trial, and did not come up by the firmware afterwards"
        )
        self.platform.boot.prefer(other(slot))
        self.ledger.mark(slot, state="bad", why=reason.text)
        accuse(self.kit, progress.begin.release, progress.began.wall, progress.begin.generation, reason)
        return Outcome({"left": True}, reason)

    def revert(self, progress: Progress, notes: Notes) -> Outcome:
        """The slot that ran before, for good: and back into it, if the candidate is what runs."""
        begin, slot = progress.begin, str(progress.data.get("slot", ""))
        blame = bool(progress.data.get("blame", True)) and progress.reason is not None
        why = progress.reason.text if progress.reason else ""
        if slot and progress.intended(Step.ACTIVATE) and not self.platform.running():
            if not self._never_left(progress):
                self._leave_unknown(progress, notes)
                why = f"{why}; nobody can tell which slot runs, also after another start"
                self.ledger.mark(slot, state="bad" if blame else "installed", why=why)
        elif slot and progress.intended(Step.ACTIVATE):
            stays = self._put_back(progress, notes, slot)
            if stays:
                why = f"{why}; {stays}"
            elif is_unseen(self.ledger.record(other(slot))):
                self.ledger.mark(other(slot), why=UNSEEN)
            if not self._never_left(progress):
                self.ledger.mark(slot, state="bad" if blame else "installed", why=why)
            elif self.ledger.record(slot).state == "trial":
                self.ledger.mark(slot, state=str(progress.data["was"]), why=why)
        if blame and begin.cause != ROLLBACK and progress.reason is not None:
            accuse(self.kit, begin.release, progress.began.wall, begin.generation, progress.reason)
        remove_tree(self.kit.layout.staging / begin.tx, self.kit.disk)
        return Outcome()

    def _never_left(self, progress: Progress) -> bool:
        """Whether the machine is still in the boot in which it was to be switched."""
        now = self.kit.clock.boot_id()
        return str(progress.data.get("left_boot", now)) == now

    def _leave_unknown(self, progress: Progress, notes: Notes) -> None:
        """What came up does not say which slot it is, so nothing can be chosen: but the firmware was asked for the
        candidate once, and one more start is the old system's. Returns where that was to no avail."""
        now = self.kit.clock.boot_id()
        if "sent_on" not in progress.data:
            notes.note(
                {"sent_on": now}, Reason("unknown-slot", "nobody can tell which slot runs: starting anew")
            )
        if progress.data.get("sent_on", now) == now:
            self._down("reboot")
            raise NotNow(Reason("not-down", "the machine did not go down for the way back"))

    def _put_back(self, progress: Progress, notes: Notes, slot: str) -> str:
        """'' when the old system is what runs and goes first; else why it is not to be had any more."""
        try:
            return "" if self._go_back(progress, notes, slot) else "it comes up all the same"
        except MachineError as error:
            if error.code != NO_IMAGE:
                raise
            why = error.text
        if "stays" not in progress.data:
            notes.note({"stays": why}, Reason(NO_IMAGE, why))
        if self.platform.running() == slot and self.platform.boot.kernel(slot).is_file():
            self.platform.boot.prefer(slot)  # there is nothing else to start
        return why

    def _go_back(self, progress: Progress, notes: Notes, slot: str) -> bool:
        """False where the machine was sent back often enough, and comes up on the candidate all the same."""
        boot, never_left, running = self.platform.boot, self._never_left(progress), self.platform.running()
        if never_left and progress.data.get("mode") == "kexec":
            with contextlib.suppress(MachineError):
                self.platform.kexec.unload()
        if never_left and progress.begin.cause == COLD_BOOT and running == slot:
            self._keep(slot, proven=False)  # it has not been tried: all is as it was
            return True
        if running == slot and not self._may_go_back(progress, notes):
            boot.prefer(slot)  # no more tries of what does not come up
            return False
        self._keep(other(slot), proven=not self._is_only_tried(progress, slot))
        reach("os:put-back")
        if running == slot:
            self._down("reboot")
            raise NotNow(Reason("not-down", "the machine did not go down for the way back"))
        return True

    def _may_go_back(self, progress: Progress, notes: Notes) -> bool:
        """Counts the starts of the machine, not the tries to bring it down."""
        sent, now = dict(progress.data.get("sent_back", {})), self.kit.clock.boot_id()
        if sent.get("boot_id") != now:
            sent = {"boot_id": now, "times": int(sent.get("times", 0)) + 1}
            notes.note({"sent_back": sent})
        return bool(sent["times"] <= MOST_BACK)

    def _is_only_tried(self, progress: Progress, slot: str) -> bool:
        """Whether the firmware was never seen to start the old system, and `slot` is there to come back to."""
        origin, running = other(slot), self.platform.running()
        if not is_unseen(self.ledger.record(origin)):
            return False
        if running == origin and self.platform.booted_by() == "firmware":
            return False
        return running == slot or progress.data.get("was") in ("good", "unknown")

    # --- at each start of the updater

    def cold_boot_seen(self) -> None:
        """Note what the firmware itself has started (`os_seen.py`). Raises MachineError: to be done again."""
        self._seen.cold_boot()

    def adopt(self) -> None:
        """Note the version of a first system, and end a trial that no journal speaks of."""
        self._seen.adopt()
