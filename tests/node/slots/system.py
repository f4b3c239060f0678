"""A whole machine with two slots, played: firmware, a loader, kernels that find their root by its hash, and its power.

The code under test is real, and so are the files; only what needs hardware is made of memory: which slot runs, going
down, and kexec. A `System` can be picked up again from its folder, as after a power cut.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from instar.core.errors import InputError, MachineError
from instar.core.journal import Begin, Progress
from instar.core.releases import Release
from instar.core.settings import OsSettings, Settings, TrialSettings
from instar.engine.driver import drive
from instar.engine.journal import Journal, Journals
from instar.engine.target import NotNow
from instar.host.boot.counting import FOLDER, LOADER, NAME, PROGRAM, SETTINGS, Counting
from instar.host.boot.efivars import Variables
from instar.host.boot.firmware import FALLBACK, Firmware
from instar.host.boot.loadoption import decode, order
from instar.host.boot.slots import Boot, Slot, other
from instar.host.boot.watchdog import Watchdog
from instar.host.files import Disk
from instar.host.layout import Layout
from instar.targets.kit import Kit, TrustedTarget, Verdict
from instar.targets.os_slot import OsSlot
from instar.targets.slots.platform import Platform, SystemProgress
from instar.targets.slots.records import SlotRecord, read_records, write_records
from instar.trust import pe
from tests.node.boot.played import DRIVE
from tests.node.slots.images import MARK, Image
from tests.node.slots.test_writer import File
from tests.node.world import PASS, UNSYNCED, FakeAgent, FakeClock, Quiet

SLOT_BYTES = 512 << 10
MOST_BOOTS = 20


class Down(BaseException):
    """The machine goes down: this process ends here."""


class SystemClock(FakeClock):
    """Wall time goes on through the starts of the machine."""

    past = 0.0

    def wall(self) -> float:
        return super().wall() + self.past

    def reboot(self) -> None:
        self.past += self.now
        super().reboot()


class System:
    """Runs `old` from slot A; `new` is on offer. Is its own server, power and kexec.

    `backend` is `firmware` or `counting`. `again`: the folder holds one already. Faults are sets of versions:
    `panics` never come up, `broken` come up and never say a word; `panics_cold` and `broken_cold` do so where the
    firmware has started them, and not where kexec has.
    """

    def __init__(
        self, folder: Path, old: Image, new: Image, backend: str = "firmware", disk: Disk = UNSYNCED,
        again: bool = False, slot_bytes: int = SLOT_BYTES,
    ) -> None:  # fmt: skip
        self.folder, self.old, self.new, self.backend, self.disk = folder, old, new, backend, disk
        self.images = [old, new]
        self.esp, self.efivars = folder / "esp", folder / "efivars"
        self.variables, self.loader_variables = Variables(self.efivars), Variables(self.efivars, LOADER)
        self.slots = {name: Slot(name, folder / f"slot-{name}", 0, slot_bytes) for name in "ab"}
        self.layout = Layout(folder / "state")
        self.clock = SystemClock()
        self.settings = OsSettings()
        self.booted = "firmware"
        self.broken, self.panics = set[str](), set[str]()
        self.broken_cold, self.panics_cold = set[str](), set[str]()
        self.kexec_loaded: bytes | None = None
        self.kexec_refused = False
        self.downs: list[str] = []
        self.on_down: Callable[[], None] = lambda: None
        self.verdict_said: Verdict = PASS
        self.source_file = File(new.bundle)
        self.room = self.esp  # the file system that is asked how much room there is
        self.asked: list[str] = []  # URLs elsewhere
        self.told: list[SystemProgress] = []
        self.watchdog = Watchdog(folder / "stop_on_reboot", folder / "watchdogs")
        self.os_release = folder / "os-release"
        if not again:
            self._install()
        (self.layout.state / "run").mkdir(exist_ok=True)
        self.running = ""
        self.agent = FakeAgent(self.layout.socket("agent"), self._answer)

    def _install(self) -> None:
        for made in (
            self.esp,
            self.efivars,
            *(self.layout.state / name for name in ("journal", "staging", "run")),
        ):
            made.mkdir(parents=True)
        for name, data in (("a", self.old.root), ("b", b"")):
            self.slots[name].device.write_bytes(data.ljust(self.slots[name].size, b"\0"))
        if self.backend == "counting":
            for path, text in ((PROGRAM, "loader"), (SETTINGS, "timeout 0\n")):
                (self.esp / path).parent.mkdir(parents=True, exist_ok=True)
                (self.esp / path).write_text(text)
        kernel = self.boot.kernel("a")
        kernel.parent.mkdir(parents=True)
        kernel.write_bytes(self.old.kernel)
        self.boot.prefer("a")
        self.record("a", self.old, "good", cold_boot_seen=True)

    def record(self, slot: str, image: Image, state: str, **more: object) -> None:
        record = SlotRecord(image.version, image.release.digest, state, len(image.root), **more)  # type: ignore[arg-type]
        write_records(self.layout.state / "os/slots.json", {**self.records(), slot: record}, UNSYNCED)
        (self.layout.state / f"os/{slot}.manifest").write_bytes(image.bundle_manifest)

    def close(self) -> None:
        self.agent.close()
        self.layout.socket("agent").unlink(missing_ok=True)

    def offer(self, image: Image) -> None:
        self.new, self.source_file = image, File(image.bundle)
        self.images.append(image)

    @property
    def boot(self) -> Boot:
        if self.backend == "counting":
            return Counting(Variables(self.efivars, LOADER, self.disk), self.esp, disk=self.disk)
        variables = Variables(self.efivars, disk=self.disk)
        return Firmware(variables, self.esp, DRIVE, self.folder / "preferred", self.disk)

    def _answer(self) -> dict[str, object] | None:
        silent = self.broken | (self.broken_cold if self.booted == "firmware" else set())
        return None if self.version in silent else {"pid": 7, "connected": True, "modules": {}}

    @property
    def version(self) -> str:
        """What runs, by what lies in the slot that is mounted."""
        return self._holds(self.running) or "?"

    def _holds(self, slot: str) -> str:
        data = self.slots[slot].device.read_bytes()
        return next((image.version for image in self.images if data.startswith(image.root)), "")

    # --- power

    def power_on(self) -> None:
        """By firmware, again and again until something comes up."""
        for _ in range(MOST_BOOTS):
            self.booted = "firmware"
            if self._start(self._chosen()):
                return
        raise AssertionError("no slot starts any more")

    def starts_without_variables(self) -> bool:
        """Whether some slot would come up had the firmware lost everything at this moment. Changes nothing."""
        copy = self.folder.with_name(f"{self.folder.name}-lost")
        shutil.copytree(self.folder, copy, ignore=shutil.ignore_patterns("efivars", "run"))
        (copy / "efivars").mkdir()
        lost = System(copy, self.old, self.new, self.backend, again=True)
        lost.images, lost.panics, lost.panics_cold = self.images, self.panics, self.panics_cold
        try:
            return any(lost._start(lost._chosen()) for _ in range(3))
        finally:
            lost.close()
            shutil.rmtree(copy)

    def images_without_a_root(self) -> list[str]:
        """Whole kernel images on the partition whose system lies in no slot: they would never come up."""
        found = [path for path in sorted(self.esp.rglob("*")) if path.is_file() and _whole(path)]
        return [path.name for path in found if not self._slot_of(path.read_bytes())]

    def _slot_of(self, kernel: bytes) -> str:
        """The slot with the root that a kernel image names."""
        file = io.BytesIO(kernel)
        wanted = pe.read(file, pe.sections(file)[".cmdline"], 4096).decode().partition(MARK)[2].split()[0]
        version = next((image.version for image in self.images if image.hash == wanted), "")
        return next((slot for slot in self.slots if version and self._holds(slot) == version), "")

    def _chosen(self) -> bytes | None:
        """The kernel image that the firmware, or the loader that it starts, takes."""
        path = self._by_loader() if self.backend == "counting" else self._by_firmware()
        return path.read_bytes() if path is not None else None

    def _by_firmware(self) -> Path | None:
        once = order(self.variables.read("BootNext") or b"")
        self.variables.delete("BootNext")
        for number in [*once, *order(self.variables.read("BootOrder") or b"")]:
            value = self.variables.read(f"Boot{number:04X}")
            path = self.esp / decode(value).path.strip("\\").replace("\\", "/") if value else None
            if path is not None and _whole(path):
                return path
        return self.esp / FALLBACK if _whole(self.esp / FALLBACK) else None

    def _by_loader(self) -> Path | None:
        """systemd-boot: the entry to try once, else its own default, else that of its settings, else another; tries
        that are left are counted."""
        once, own = (
            (self.loader_variables.read(f"LoaderEntry{name}") or b"").decode("utf-16-le").rstrip("\0")
            for name in ("OneShot", "Default")
        )
        self.loader_variables.delete("LoaderEntryOneShot")
        settings = (self.esp / SETTINGS).read_text().splitlines()
        default = next((line.split()[1] for line in settings if line.startswith("default ")), "")
        found = {match[1]: (path, match) for path in sorted((self.esp / FOLDER).iterdir())
                 if (match := NAME.fullmatch(path.name)) and _whole(path)}  # fmt: skip
        good = [slot for slot in sorted(found) if found[slot][1][2] != "0"]
        # By the whole name, with its numbers, as loaders up to systemd 258 do it.
        wanted = [
            slot for name in (once, own, default) for slot in good if fnmatch(found[slot][0].name, name)
        ]
        for slot in [*wanted, *good, *sorted(found)]:
            path, match = found[slot]
            if match[2] is None or int(match[2]) == 0:
                return path
            return path.rename(
                path.with_name(f"instar-{slot}+{int(match[2]) - 1}-{int(match[3] or 0) + 1}.efi")
            )
        return None

    def _start(self, kernel: bytes | None) -> bool:
        """The kernel looks for the slot with its root; whether it came up."""
        self.clock.reboot()
        self.kexec_loaded, self.running = None, ""
        if kernel is None:
            return False
        slot = self._slot_of(kernel)
        panics = self.panics | (self.panics_cold if self.booted == "firmware" else set())
        self.running = slot if slot and self._holds(slot) not in panics else ""
        return bool(self.running)

    def reboot(self) -> None:
        self.downs.append("reboot")
        raise Down

    def kexec(self) -> None:
        self.downs.append("kexec")
        raise Down

    def load(self, image: Path, slot: str) -> None:
        if self.kexec_refused:
            raise MachineError("kexec-refused", "cannot load the kernel for kexec: not permitted")
        self.kexec_loaded = image.read_bytes()

    def unload(self) -> None:
        self.kexec_loaded = None

    def after_down(self) -> None:
        """What the machine does once it is down."""
        self.on_down()
        kernel, by_kexec = self.kexec_loaded, self.downs[-1:] == ["kexec"]
        if by_kexec and kernel is not None:
            self.booted = "kexec"
            if self._start(kernel):
                return
        self.power_on()

    # --- the server

    def trusted_target(self, target: str, metadata: Path | None = None) -> TrustedTarget:
        built = self.new.built
        return TrustedTarget(f"/v1/{target}", built.length, built.sha256, built.custom)

    def verdict(self, line: str, phase: str, tx: str, digest: str, wait_s: float) -> Verdict:
        return self.verdict_said

    def source(self) -> File:
        return self.source_file

    def elsewhere(self, url: str) -> tuple[File, str]:
        self.asked.append(url)
        return self.source_file, "/there"

    # --- the node

    def target(self) -> OsSlot:
        platform = Platform(
            self.slots, self.boot, self.room, self, self, ("board",), "x86_64",
            lambda: self.running, lambda: self.booted, self.watchdog, self.os_release,
        )  # fmt: skip
        settings = Settings(trial=TrialSettings(hold_s=1.0, lease_s=20.0, cap_s=60.0), os=self.settings)
        kit = Kit(
            self.layout, self.clock, None, self, settings, None, self.clock.sleep, self.disk,  # type: ignore[arg-type]
        )  # fmt: skip
        return OsSlot(kit, platform, tell=self.told.append)

    @property
    def journals(self) -> Journals:
        return Journals(self.layout.journal, self.clock, self.disk)

    def begin(self, mode: str = "reboot", tx: str = "tx-1", **more: object) -> Begin:
        """Of a wish for what is on offer."""
        release = self.new.release
        return self._began(
            tx, release, replace(self._blank(tx, release), target=self.new.built.path, mode=mode), more
        )

    def begin_rollback(self, tx: str = "tx-2") -> Begin:
        record = self.records()[other(self.running)]
        release = Release(record.version, record.digest)
        return self._began(
            tx, release, replace(self._blank(tx, release), cause="rollback", mode="reboot"), {}
        )

    def begin_cold_boot(self, tx: str = "tx-2") -> Begin:
        record = self.records()[self.running]
        release = Release(record.version, record.digest)
        return self._began(
            tx, release, replace(self._blank(tx, release), cause="cold-boot", mode="reboot"), {}
        )

    def _blank(self, tx: str, release: Release) -> Begin:
        records = self.records()
        running = records[self.running].name if self.running else ""
        beside = records[other(self.running)].name if self.running else ""
        return Begin(tx, "os", release.version, release.digest, "", running, beside, "wish", 1)

    def _began(self, tx: str, release: Release, begin: Begin, more: dict[str, object]) -> Begin:
        self.clock.now += 1.0  # journals are told apart by their time
        begin = replace(begin, **more)  # type: ignore[arg-type]
        self.journals.begin(begin)
        return begin

    def records(self) -> dict[str, SlotRecord]:
        return read_records(self.layout.state / "os/slots.json")

    def go_on(self) -> Progress:
        """What the updater does at each start, through as many starts of the machine as it takes. The last
        transaction's end."""
        for _ in range(MOST_BOOTS):
            try:
                target = self.start()
                for journal in self._open():
                    drive(journal, target, Quiet())
                return self.journals.open_all()[-1].progress
            except Down:
                self.after_down()
            except NotNow:
                self.clock.sleep(5.0)
        raise AssertionError("it never comes to an end")

    def start(self) -> OsSlot:
        """What is put in order when the updater starts."""
        target = self.target()
        target.cold_boot_seen()
        target.adopt()
        target.platform.boot.repair()
        return target

    def _open(self) -> list[Journal]:
        return self.journals.unfinished()

    def update(self, mode: str = "reboot", tx: str = "tx-1", **more: object) -> Progress:
        self.begin(mode, tx, **more)
        return self.go_on()

    # --- what is there

    def everything(self) -> dict[str, bytes]:
        """Slots, variables and the EFI system partition: what a refusal must leave as it was."""
        found = [*self.efivars.iterdir(), *(slot.device for slot in self.slots.values())]
        found += [path for path in self.esp.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}

    def lose_variables(self) -> None:
        for path in self.efivars.iterdir():
            path.unlink()


def reason(progress: Progress) -> str:
    return progress.reason.code if progress.reason else ""


def _whole(path: Path) -> bool:
    with contextlib.suppress(OSError, InputError), path.open("rb") as file:
        return ".cmdline" in pe.sections(file) and os.fstat(file.fileno()).st_size > 0
    return False
