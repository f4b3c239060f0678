"""The node's operating system, as a thing that can be replaced: an image into the slot that does not run.

The slot is poisoned first: it loses its kernel image before a byte of it is written, and gets one back only
when the root image has been read back from the disk. So at every moment the firmware finds nothing but whole
systems. Activating asks the firmware for one try (or loads the kernel for kexec) and lets the machine go down in
the watch, after the caller has had his answer. What came up is known from the mounted root alone. The boot
order is moved only when the trial is passed, and read back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from instar.core import quarantine
from instar.core.errors import InstarError, MachineError, ServerRefused, ServerUnreachable, TrustError
from instar.core.journal import Progress, Reason
from instar.core.lease import Lease
from instar.core.light import asdict
from instar.core.recovery import Observation
from instar.core.releases import version_key
from instar.core.transaction import State, Step
from instar.core.trial import Confirm, Facts, Health, Revert, judge, read_health
from instar.engine.fetch import Pace
from instar.engine.target import Failed, Notes, NotNow, Outcome
from instar.host import zstd
from instar.host.boot import esp
from instar.host.boot.slots import Slot, other
from instar.host.files import make_folder, remove_tree, write_atomic
from instar.host.points import reach
from instar.host.records import read_quarantine, write_quarantine
from instar.host.sockets import ask
from instar.targets.kit import Kit, TrustedTarget
from instar.targets.slots.platform import Platform, Tell, untold
from instar.targets.slots.records import SlotRecord, read_records, write_records
from instar.targets.slots.source import Frames, Place, index, read_head
from instar.targets.slots.writer import Writer, check_slot
from instar.trust.bundle import KIND, Bundle, Chunk, Image, decode

ROLE = "os"
MODES = ("none", "reboot", "kexec")
DOWN_WITHIN_S = 300.0  # a machine that is not down by then does not go down
LOOK_S = 0.25
ASK_S, VERDICT_S = 1.0, 1.0
MANIFEST, KERNEL = "bundle.json", "kernel.efi"


class OsSlot:
    """Holds only what can be found out again. `answer_s`: from the activation to the machine's way down."""

    def __init__(self, kit: Kit, platform: Platform, answer_s: float = 10.0, tell: Tell = untold) -> None:
        self.kit, self.platform, self.answer_s, self.tell = kit, platform, answer_s, tell
        self.path = kit.layout.state / "os" / "slots.json"

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
        if running != activated["slot"]:
            text = f"slot {running or 'unknown'} came up in place of slot {activated['slot']}"
            return Observation(current, previous, Reason("fell-back", text))
        return Observation(progress.begin.release.name, previous)

    def records(self) -> dict[str, SlotRecord]:
        return read_records(self.path)

    def _idle(self) -> str:
        """The slot that may be written. Raises MachineError `unknown-slot`: unsure means none."""
        running = self.platform.running()
        if not running:
            text = "cannot tell which slot runs: the mounted root lies on neither of the two"
            raise MachineError("unknown-slot", text)
        return other(running)

    # --- bringing it there

    def stage(self, progress: Progress, notes: Notes) -> Outcome:
        begin, kit = progress.begin, self.kit
        slot = self._idle()
        target = kit.server.trusted_target(begin.target)
        _check_promise(progress, target)
        staging = kit.layout.staging / begin.tx
        make_folder(staging, 0o700, kit.disk)
        head = read_head(kit.server.source(), target.path, begin.digest)
        self._check_fits(head.bundle, slot)
        write_atomic(staging / MANIFEST, head.bundle.encode(), 0o600, kit.disk)
        start = self._poison(slot, progress, head.bundle)
        pace = Pace(kit.settings.network.rate_bytes_s, kit.clock.monotonic, kit.sleep)

        def frames(needed: list[Chunk]) -> Frames:
            return Frames(kit.server.source(), target.path, head.frames, needed, pace.spend)

        root, kernel = head.bundle.image("root"), head.bundle.image("kernel")
        running = self.platform.slots[other(slot)]
        local = self._local(running)
        writer = Writer(root, self.platform.slots[slot], running, local, zstd.decompressor())
        writer.write(start, frames, lambda done: self._mark(slot, done=done))
        fetched = self._save(kernel, staging / KERNEL, frames)
        self._mark(slot, done=root.size)
        bytes_ = {"fetched": head.fetched + writer.fetched + fetched, "reused": writer.reused}
        return Outcome({"slot": slot, "bytes": bytes_})

    def _check_fits(self, bundle: Bundle, slot: str) -> None:
        """Refuse before anything is written."""
        platform, running = self.platform, self.records()[other(slot)]
        if bundle.arch != platform.arch or not set(bundle.compatible) & set(platform.hardware):
            text = f"expected a bundle for {platform.arch} {'/'.join(platform.hardware)}, got {bundle.arch} "
            raise Failed(Reason("wrong-hardware", text + "/".join(bundle.compatible)))
        if bundle.min_version and (
            not running.version or version_key(running.version) < version_key(bundle.min_version)
        ):
            text = f"expected the system to be {bundle.min_version} at least, it is {running.version or 'unknown'}"
            raise Failed(Reason("too-old-system", text), blame=False)
        if bundle.image("root").size > platform.slots[slot].size:
            text = f"expected a slot of {bundle.image('root').size} bytes, got {platform.slots[slot].size}"
            raise Failed(Reason("slot-too-small", text))
        esp.check_room(platform.esp, bundle.image("kernel").size)

    def _poison(self, slot: str, progress: Progress, bundle: Bundle) -> int:
        """Make the slot not bootable, by name and by record. From which byte its image is to be written on."""
        begin, old = progress.begin, self.records()[slot]
        esp.remove(self.platform.boot.kernel(slot), self.kit.disk)
        reach("os:poisoned")
        if (old.state, old.digest) == ("writing", begin.digest):
            starts = [chunk.offset for chunk in bundle.image("root").chunks]
            return max((start for start in starts if start <= old.done), default=0)
        size = bundle.image("root").size
        self._put(slot, SlotRecord(begin.version, begin.digest, "writing", size, 0, self.kit.clock.wall()))
        return 0

    def _local(self, running: Slot) -> dict[str, Place]:
        record = self.records()[running.name]
        return index(running, record.size or running.size)

    def _save(self, kernel: Image, path: Path, frames: Callable[[list[Chunk]], Frames]) -> int:
        """The kernel image into the staging folder, chunk by chunk checked; how many bytes came."""
        path.write_bytes(b"")
        file = Slot("kernel", path, 0, kernel.size)
        writer = Writer(kernel, file, None, {}, zstd.decompressor())
        writer.write(0, frames, lambda _: None)
        return writer.fetched

    def verify(self, progress: Progress, notes: Notes) -> Outcome:
        """Both images from the disk itself; the kernel image goes to its place last."""
        slot, staging = str(progress.data["slot"]), self.kit.layout.staging / progress.begin.tx
        try:
            bundle = decode((staging / MANIFEST).read_bytes())
            kernel = bundle.image("kernel")
            check_slot(bundle.image("root"), self.platform.slots[slot])
            reach("os:read-back")
            with (staging / KERNEL).open("rb") as file:
                esp.place(file, kernel.size, kernel.sha256, self._new_kernel(slot), self.kit.disk)
        except OSError as error:
            raise MachineError("disk-failed", f"cannot read {staging}: {error.strerror}") from None
        reach("os:placed")
        self._mark(slot, state="installed", why="")
        remove_tree(staging, self.kit.disk)
        return Outcome({"deny_kexec": list(bundle.deny_kexec)})

    def _new_kernel(self, slot: str) -> Path:
        return self.platform.boot.kernel(slot)

    def rehearse(self, progress: Progress, notes: Notes) -> Outcome:
        """What can be tried without going down: the kernel is taken, the entries can be written."""
        mode, slot = progress.begin.mode, str(progress.data["slot"])
        repaired = self.platform.boot.repair()
        if mode != "kexec":
            return Outcome({"mode": mode, "repaired": repaired})
        denied = set(progress.data.get("deny_kexec", ())) & set(self.platform.hardware)
        if denied:
            reason = Reason(
                "kexec-denied", f"the bundle denies kexec on {min(denied)}; rebooting in its place"
            )
            return Outcome({"mode": "reboot", "repaired": repaired}, reason)
        try:
            self.platform.kexec.load(self.platform.boot.kernel(slot), slot)
            self.platform.kexec.unload()
        except MachineError as error:
            reason = Reason(error.code, f"{error.text}; rebooting in its place")
            return Outcome({"mode": "reboot", "repaired": repaired}, reason)
        return Outcome({"mode": "kexec", "repaired": repaired})

    # --- the switch

    def activate(self, progress: Progress, notes: Notes) -> Outcome:
        mode, slot, clock = str(progress.data["mode"]), str(progress.data["slot"]), self.kit.clock
        if "before" not in progress.data:
            notes.note({"before": self._health(), "origin_slot": other(slot)})
        if mode == "kexec":
            self.platform.kexec.load(self.platform.boot.kernel(slot), slot)
        elif mode == "reboot":
            self.platform.boot.try_once(slot)
        reach("os:asked")
        if mode != "none":
            self._mark(slot, state="trial")
        wanted = self.kit.settings.trial
        lease = Lease(wanted.lease_s, wanted.cap_s, clock.boot_id(), clock.boottime())
        activated = {"mode": mode, "slot": slot, "boot_id": clock.boot_id(), "at": clock.boottime()}
        return Outcome({"activated": activated, "lease": asdict(lease)})

    def watch(self, progress: Progress, notes: Notes) -> Outcome:
        activated = progress.data["activated"]
        if activated["mode"] == "none":
            return Outcome()
        if activated["boot_id"] == self.kit.clock.boot_id():
            self._go_down(activated, notes)
        return self._judge(progress, notes)

    def _go_down(self, activated: dict[str, Any], notes: Notes) -> None:
        """Let the caller have his answer first, then the machine goes down: this process ends with it."""
        clock = self.kit.clock
        left = activated["at"] + self.answer_s - clock.boottime()
        if left > 0:
            self.kit.sleep(left)
        reach("os:down")
        self._down(str(activated["mode"]))
        raise Failed(
            Reason("not-down", f"the machine did not go down within {DOWN_WITHIN_S:g} s"), blame=False
        )

    def _down(self, mode: str) -> None:
        power = self.platform.power
        power.kexec() if mode == "kexec" else power.reboot()
        end = self.kit.clock.boottime() + DOWN_WITHIN_S
        while self.kit.clock.boottime() < end:
            self.kit.sleep(LOOK_S)

    def _judge(self, progress: Progress, notes: Notes) -> Outcome:
        """The trial of the system that came up, by the same rules as any other release."""
        kit, begin = self.kit, progress.begin
        by = self.platform.booted_by()
        slot = str(progress.data["slot"])
        self._mark(slot, booted_by=by)
        before = read_health(progress.data.get("before", {}))
        lease = Lease(**progress.data["lease"])
        if lease.boot_id != kit.clock.boot_id():  # the boot itself does not count
            lease = Lease(lease.lease_s, lease.cap_s, kit.clock.boot_id(), kit.clock.boottime())
            notes.note({"lease": asdict(lease)})
        up_since, pid = kit.clock.boottime(), 0
        while True:
            facts, pid, up_since = self._facts(progress, lease, pid, up_since)
            match judge(facts, begin.digest, before, kit.settings.trial.hold_s, lease):
                case Confirm():
                    return Outcome({"booted_by": by})
                case Revert(reason, blame):
                    raise Failed(reason, blame)
                case _:
                    kit.sleep(LOOK_S)

    def _facts(self, progress: Progress, lease: Lease, pid: int, since: float) -> tuple[Facts, int, float]:
        kit, begin = self.kit, progress.begin
        spent = lease.spent(kit.clock.boot_id(), kit.clock.boottime())
        try:
            verdict = kit.server.verdict(ROLE, "trial", begin.tx, begin.digest, VERDICT_S)
            word, why = verdict.verdict, verdict.reason
        except (ServerUnreachable, ServerRefused) as error:
            word, why = "unreachable", Reason(error.code, error.text)
        try:
            said = ask(kit.layout.socket("agent"), {"do": "health"}, ASK_S)
        except InstarError:
            return Facts(spent, False, "", 0.0, Health(), word, why), 0, since
        if int(said.get("pid", 0)) != pid:
            pid, since = int(said.get("pid", 0)), kit.clock.boottime()
        up_s = kit.clock.boottime() - since
        return Facts(spent, True, begin.digest, up_s, read_health(said), word, why), pid, since

    def confirm(self, progress: Progress, notes: Notes) -> Outcome:
        """The boot order is written and read back. A start by kexec alone is no proof of a cold boot."""
        slot = str(progress.data["slot"])
        if progress.data["activated"]["mode"] == "none":
            self._mark(slot, state="installed", why="installed, not active")
            return Outcome()
        self.platform.boot.prefer(slot)
        reach("os:preferred")
        if (
            self.platform.running() != slot
        ):  # the power went right after the decision: the one try was used up
            self._down("reboot")
            raise NotNow(Reason("not-down", "the machine did not go down for the slot that was confirmed"))
        cold = progress.data.get("booted_by") == "firmware"
        why = "" if cold else "confirmed, cold boot not seen"
        self._mark(slot, state="good", cold_boot_seen=cold, why=why)
        return Outcome()

    def revert(self, progress: Progress, notes: Notes) -> Outcome:
        """The other slot, for good: and back into it, if the candidate is what runs."""
        begin = progress.begin
        slot = progress.data.get("slot")
        running = self.platform.running()
        if slot is not None and progress.intended(Step.ACTIVATE) and running:
            origin = other(str(slot))
            self.platform.boot.prefer(origin)
            reach("os:put-back")
            if running == slot:
                self._down("reboot")
                raise NotNow(Reason("not-down", "the machine did not go down for the way back"))
        if slot is not None:
            why = progress.reason.text if progress.reason else ""
            writing = self.records()[str(slot)].state == "writing"
            self._mark(str(slot), state="writing" if writing else "bad", why=why)
        if progress.data.get("blame", True) and progress.reason is not None:
            self._quarantine(progress, progress.reason)
        remove_tree(self.kit.layout.staging / begin.tx, self.kit.disk)
        return Outcome()

    # --- small things

    def cold_boot_seen(self) -> None:
        """To be called at each start of the updater: note what the firmware itself has started."""
        running = self.platform.running()
        if not running or self.platform.booted_by() != "firmware":
            return
        record = self.records()[running]
        if record.state == "good" and not record.cold_boot_seen:
            self._mark(running, cold_boot_seen=True, why="")

    def adopt(self) -> None:
        """To be called at each start of the updater, after `cold_boot_seen`."""

    def _health(self) -> dict[str, object]:
        try:
            health = read_health(ask(self.kit.layout.socket("agent"), {"do": "health"}, ASK_S))
        except InstarError:
            return {"connected": False, "modules": {}}
        return {"connected": health.connected, "modules": health.modules}

    def _mark(self, slot: str, **changes: Any) -> None:
        record = self.records()[slot]
        new = record._replace(**changes)
        if new.state != record.state:
            new = new._replace(since=self.kit.clock.wall())
        if new != record:
            self._put(slot, new)

    def _put(self, slot: str, record: SlotRecord) -> None:
        write_records(self.path, {**self.records(), slot: record}, self.kit.disk)

    def _quarantine(self, progress: Progress, reason: Reason) -> None:
        path, begin = self.kit.layout.quarantine, progress.begin
        entries, name = read_quarantine(path), quarantine.key(ROLE, begin.digest)
        old = entries.get(name)
        if old is not None and old.since >= progress.began.wall:
            return
        now = self.kit.clock.wall()
        entries = quarantine.add(entries, name, begin.version, reason, now, begin.generation)
        write_quarantine(path, entries, self.kit.disk)


def _check_promise(progress: Progress, target: TrustedTarget) -> None:
    begin = progress.begin
    wanted = {"kind": KIND, "version": begin.version, "digest": begin.digest}
    for name, want in wanted.items():
        if target.custom.get(name) != want:
            text = (
                f"{begin.target}: expected {name} {want}, the signed metadata says {target.custom.get(name)}"
            )
            raise TrustError("wish-differs", text)
