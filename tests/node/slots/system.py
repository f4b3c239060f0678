"""A whole machine with two slots, played: firmware, kernels that find their root by its hash, and its power.

The code under test is real, and so are the files; only what needs hardware is made of memory: which slot runs, going
down, and kexec.
"""

from __future__ import annotations

import hashlib
import io
import random
from pathlib import Path

from instar.core.journal import Begin, Progress
from instar.core.releases import Release
from instar.core.settings import Settings, TrialSettings
from instar.engine.driver import drive
from instar.engine.journal import Journal, Journals
from instar.engine.target import NotNow
from instar.host.boot.firmware import FALLBACK
from instar.host.boot.loadoption import decode, order
from instar.host.boot.slots import Slot, other
from instar.host.layout import Layout
from instar.targets.kit import Kit, TrustedTarget, Verdict
from instar.targets.os_slot import OsSlot
from instar.targets.slots.platform import Platform
from instar.targets.slots.records import SlotRecord, read_records, write_records
from instar.trust import pe
from instar_server.trust.bundle import About, Built, build
from tests.node.boot import played
from tests.node.boot.test_disks import image as kernel_image
from tests.node.slots.test_writer import File
from tests.node.world import PASS, UNSYNCED, FakeAgent, FakeClock, Quiet

SLOT_BYTES = 512 << 10
MARK = "roothash="
MOST_BOOTS = 20


class Down(BaseException):
    """The machine goes down: this process ends here."""


class Image:
    """One version: a root, a kernel that names its hash, both in a bundle."""

    def __init__(self, folder: Path, version: str, seed: int, hardware: str = "board") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.version = version
        self.root = random.Random(1).randbytes(200 << 10) + random.Random(seed).randbytes(40 << 10)
        line = f"quiet {MARK}{hashlib.sha256(self.root).hexdigest()}"
        self.kernel = kernel_image({".linux": b"k" * 5000, ".initrd": b"i" * 5000, ".cmdline": line.encode()})
        root, kernel, self.bundle = (folder / f"{version}.{kind}" for kind in ("root", "kernel", "bundle"))
        root.write_bytes(self.root)
        kernel.write_bytes(self.kernel)
        about = About("lab", version, (hardware,), "x86_64")
        self.built: Built = build(about, root, kernel, self.bundle)

    @property
    def release(self) -> Release:
        return Release(self.version, str(self.built.custom["digest"]))


class System:
    """Runs `old` from slot A; `new` is on offer. Is its own server, power and kexec."""

    def __init__(self, folder: Path, old: Image, new: Image) -> None:
        self.old, self.new = old, new
        self.machine = played.Machine(folder / "firmware")
        self.slots = {name: Slot(name, folder / f"slot-{name}", 0, SLOT_BYTES) for name in "ab"}
        for name, data in (("a", old.root), ("b", b"")):
            self.slots[name].device.write_bytes(data.ljust(SLOT_BYTES, b"\0"))
        self.layout = Layout(folder / "state")
        for made in ("journal", "staging", "run"):
            (self.layout.state / made).mkdir(parents=True)
        self.clock = FakeClock()
        self.booted, self.broken = "firmware", set[str]()  # versions that come up and never say a word
        self.panics = set[str]()  # versions that never come up
        self.kexec_loaded: bytes | None = None
        self.kexec_refused = False
        self.downs: list[str] = []
        self.verdict_said: Verdict = PASS
        self.source_file = File(new.bundle)
        boot = self.machine.firmware
        kernel = boot.kernel("a")
        kernel.parent.mkdir(parents=True)
        kernel.write_bytes(old.kernel)
        boot.prefer("a")
        record = SlotRecord(old.version, old.release.digest, "good", len(old.root), cold_boot_seen=True)
        write_records(self.layout.state / "os/slots.json", {"a": record})
        self.running = ""
        self.agent = FakeAgent(self.layout.socket("agent"), self._answer)
        self.power_on()

    def close(self) -> None:
        self.agent.close()

    def _answer(self) -> dict[str, object] | None:
        version = self.version
        return None if version in self.broken else {"pid": 7, "connected": True, "modules": {}}

    @property
    def version(self) -> str:
        """What runs, by what lies in the slot that is mounted."""
        data = self.slots[self.running].device.read_bytes()
        return next((each.version for each in (self.old, self.new) if data.startswith(each.root)), "?")

    # --- power

    def power_on(self) -> None:
        """By firmware, again and again until something comes up."""
        for _ in range(MOST_BOOTS):
            self.booted = "firmware"
            if self._start(self._chosen()):
                return
        raise AssertionError("no slot starts any more")

    def _chosen(self) -> bytes | None:
        """The kernel image that firmware starts."""
        variables, esp = self.machine.variables, self.machine.esp
        once = order(variables.read("BootNext") or b"")
        variables.delete("BootNext")
        for number in [*once, *order(variables.read("BootOrder") or b"")]:
            value = variables.read(f"Boot{number:04X}")
            path = esp / decode(value).path.strip("\\").replace("\\", "/") if value else None
            if path is not None and _whole(path):
                return path.read_bytes()
        return (esp / FALLBACK).read_bytes() if _whole(esp / FALLBACK) else None

    def _start(self, kernel: bytes | None) -> bool:
        """The kernel looks for the slot with its root; whether it came up."""
        self.clock.reboot()
        self.kexec_loaded, self.running = None, ""
        if kernel is None:
            return False
        file = io.BytesIO(kernel)
        line = pe.read(file, pe.sections(file)[".cmdline"], 4096).decode()
        wanted = line.partition(MARK)[2].split()[0]
        for name, slot in self.slots.items():
            data = slot.device.read_bytes()
            for image in (self.old, self.new):
                same = hashlib.sha256(image.root).hexdigest() == wanted and data.startswith(image.root)
                if same and image.version not in self.panics:
                    self.running = name
                    return True
        return False

    def reboot(self) -> None:
        self.downs.append("reboot")
        raise Down

    def kexec(self) -> None:
        self.downs.append("kexec")
        raise Down

    def load(self, image: Path, slot: str) -> None:
        from instar.core.errors import MachineError

        if self.kexec_refused:
            raise MachineError("kexec-refused", "cannot load the kernel for kexec: not permitted")
        self.kexec_loaded = image.read_bytes()

    def unload(self) -> None:
        self.kexec_loaded = None

    def after_down(self) -> None:
        """What the machine does once it is down."""
        kernel, by_kexec = self.kexec_loaded, self.downs[-1:] == ["kexec"]
        if by_kexec and kernel is not None:
            self.booted = "kexec"
            if self._start(kernel):
                self.booted = "kexec"
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

    # --- the node

    def target(self) -> OsSlot:
        platform = Platform(
            self.slots, self.machine.firmware, self.machine.esp, self, self, ("board",), "x86_64",
            lambda: self.running, lambda: self.booted,
        )  # fmt: skip
        trial = TrialSettings(hold_s=1.0, lease_s=20.0, cap_s=60.0)
        kit = Kit(
            self.layout, self.clock, None, self, Settings(trial=trial), None, self.clock.sleep, UNSYNCED,  # type: ignore[arg-type]
        )  # fmt: skip
        return OsSlot(kit, platform)

    def begin(self, mode: str) -> None:
        release, record = self.new.release, self.records()[self.running]
        begin = Begin(
            "tx-1", "os", release.version, release.digest, self.new.built.path, record.name,
            self.records()[other(self.running)].name, "wish", 1, mode=mode,
        )  # fmt: skip
        Journals(self.layout.journal, self.clock, UNSYNCED).begin(begin)

    def records(self) -> dict[str, SlotRecord]:
        return read_records(self.layout.state / "os/slots.json")

    def journal(self) -> Journal:
        return Journals(self.layout.journal, self.clock, UNSYNCED).open_all()[0]

    def go_on(self) -> Progress:
        """What the updater does at each start, through as many starts of the machine as it takes."""
        for _ in range(MOST_BOOTS):
            target = self.target()
            target.cold_boot_seen()
            try:
                return drive(self.journal(), target, Quiet())
            except Down:
                self.after_down()
            except NotNow:
                self.clock.sleep(5.0)
        raise AssertionError("it never comes to an end")


def _whole(path: Path) -> bool:
    from instar.core.errors import InputError

    try:
        with path.open("rb") as file:
            return ".cmdline" in pe.sections(file)
    except (OSError, InputError):
        return False
