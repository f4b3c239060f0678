"""A system update inside the guest by the node's own code, with a file for a server: what crash replay records.

process_one.py runs it at each start. At the first it begins the update, which ends in a reboot by the firmware;
at the second it goes on to the end. Every place that the code names (`instar.host.points`) is marked on the disk:
a sector of its own in the gap before the first partition, written past the cache and with no flush, so that the
marks change nothing of the order in which anything else becomes durable.

Last, each in a section of its own, come ways to change the EFI system partition that are wrong. A judge of the
replay must see every one of them.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA = Path("/data")
sys.path.insert(0, str(DATA / "instar.pyz"))

from instar.core.journal import Begin, Progress, Reason  # noqa: E402
from instar.core.settings import Settings, TrialSettings  # noqa: E402
from instar.engine.driver import drive  # noqa: E402
from instar.engine.journal import Journals  # noqa: E402
from instar.host import points  # noqa: E402
from instar.host.boot import esp, finding, kexec  # noqa: E402
from instar.host.boot.firmware import FALLBACK  # noqa: E402
from instar.host.boot.running import booted_by, running  # noqa: E402
from instar.host.boot.slots import Boot, other  # noqa: E402
from instar.host.clock import Clock  # noqa: E402
from instar.host.files import DISK, Disk  # noqa: E402
from instar.host.layout import Layout  # noqa: E402
from instar.targets.kit import Kit, TrustedTarget, Verdict  # noqa: E402
from instar.targets.os_slot import OsSlot  # noqa: E402
from instar.targets.slots.platform import Platform  # noqa: E402
from instar.targets.slots.records import SlotRecord, write_records  # noqa: E402

DEVICE, ESP, STATE = Path("/dev/nvme0n1"), Path("/efi"), DATA / "instar"
SLOTS = ("instar-system-a", "instar-system-b")
ORDER = (
    DATA / "order.json"
)  # {"old": {…}, "new": {version, digest, target, custom, …}, "mark_at", "hardware"}
BUNDLE = DATA / "new.bundle"
SECTOR = 512
PIECE = 1 << 20
SETTLE_S = 1.5


class Marks:
    """Writes the names of the points that are reached to the byte `at` of the disk."""

    def __init__(self, at: int, magic: bytes) -> None:
        self._at, self._magic, self._count = at, magic, 0
        self._fd = os.open(DEVICE, os.O_WRONLY | os.O_DIRECT)
        self._page = mmap.mmap(-1, mmap.PAGESIZE)  # direct writes want an aligned buffer

    def __call__(self, point: str) -> None:
        self._count += 1
        text = self._magic + f"{self._count} {point}".encode()
        self._page[:SECTOR] = text[:SECTOR].ljust(SECTOR, b"\0")
        os.pwrite(self._fd, memoryview(self._page)[:SECTOR], self._at)

    def section(self, name: str) -> None:
        """A mark with a flush before and behind it: it stands alone, and parts what is judged apart."""
        os.sync()
        os.fsync(self._fd)
        self(f"section {name}")
        os.fsync(self._fd)


class Server:
    """The bundle's file, and what a server would have said of it."""

    def __init__(self, new: dict[str, Any]) -> None:
        self._new = new

    def trusted_target(self, target: str, metadata: Path | None = None) -> TrustedTarget:
        new = self._new
        return TrustedTarget(f"/v1/{target}", new["length"], new["sha256"], new["custom"])

    def verdict(self, line: str, phase: str, tx: str, digest: str, wait_s: float, **more: Any) -> Verdict:
        return Verdict("pass", Reason("", ""))

    def source(self) -> Any:
        return self

    def elsewhere(self, url: str) -> tuple[Any, str]:
        raise AssertionError(f"nobody ordered {url}")

    @contextlib.contextmanager
    def stream(
        self, path: str, start: int, stop: int | None = None
    ) -> Iterator[tuple[bool, Iterator[bytes]]]:
        with BUNDLE.open("rb") as file:
            file.seek(start)
            yield (
                True,
                iter(lambda: file.read(PIECE), b""),
            )  # may tell more than was asked for: who reads knows


class Power:
    def reboot(self) -> None:
        subprocess.run(["/usr/bin/busybox", "reboot", "-f"], check=True)

    def kexec(self) -> None:
        raise AssertionError("nobody asked for kexec")


class Follower:
    def changed(self, progress: Progress) -> None:
        print(f"LAB {progress.state.value} {progress.reason.text if progress.reason else ''}", flush=True)


def agent(path: Path) -> None:
    """One that is well, whoever asks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(8)

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65_536)
                connection.sendall(b'{"ok":true,"pid":7,"connected":true,"modules":{}}\n')

    threading.Thread(target=serve, daemon=True).start()


def begin(layout: Layout, order: dict[str, Any], boot: Boot) -> None:
    """The wish, on a node whose slot A has been good for long."""
    old, new = order["old"], order["new"]
    for folder in (layout.journal, layout.staging, layout.run):
        folder.mkdir(parents=True, exist_ok=True)
    boot.prefer("a")
    record = SlotRecord(old["version"], old["digest"], "good", old["size"], cold_boot_seen=True)
    write_records(layout.state / "os/slots.json", {"a": record})
    wish = Begin(
        "tx-1", "os", new["version"], new["digest"], new["target"], record.name, "", "wish", 1, mode="reboot"
    )
    Journals(layout.journal, Clock()).begin(wish)


class Forgetful(Disk):
    """Leaves out the sync of a renamed file."""

    def sync_file(self, path: Path) -> None:
        return


def mistakes(marks: Marks, kernel: Path, fallback: Path) -> None:
    """With a kernel image that may go, and one that may be replaced."""
    marks.section("prepared")
    copy = DATA / "kernel.efi"
    copy.write_bytes(kernel.read_bytes())
    size = copy.stat().st_size
    esp.remove(kernel)
    marks.section("unsynced")
    with copy.open("rb") as file:
        sha256 = esp.digest(file, size)
        file.seek(0)
        esp.place(file, size, sha256, kernel, Forgetful())
    time.sleep(SETTLE_S)
    marks.section("removed")
    kernel.unlink()
    DISK.sync_folder(kernel.parent)
    time.sleep(SETTLE_S)
    marks.section("prepared")
    new = fallback.with_name("new")
    new.write_bytes(copy.read_bytes())
    marks.section("replaced")
    new.rename(fallback)
    DISK.sync_file(fallback)
    DISK.sync_folder(fallback.parent)
    time.sleep(SETTLE_S)
    marks.section("over")


def main() -> int:
    order = json.loads(ORDER.read_bytes())
    marks = Marks(order["mark_at"], order["magic"].encode())
    layout, clock = Layout(STATE), Clock()
    found = finding.find(DEVICE, SLOTS, ESP, STATE / "os/order")
    if not layout.journal.is_dir():
        begin(layout, order, found.boot)
        marks.section("update")
    points.listener = marks
    agent(layout.socket("agent"))
    platform = Platform(
        slots=found.slots, boot=found.boot, esp=ESP, kexec=kexec, power=Power(), hardware=(order["hardware"],),
        arch=finding.machine(), running=lambda: running(found.slots.values()), booted_by=booted_by,
    )  # fmt: skip
    trial = TrialSettings(hold_s=1.0, lease_s=120.0, cap_s=240.0)
    server: Any = Server(order["new"])
    nobody: Any = None
    kit = Kit(layout, clock, nobody, server, Settings(trial=trial), nobody, time.sleep, DISK)
    target = OsSlot(kit, platform, answer_s=0.5)
    progress = drive(Journals(layout.journal, clock).open_all()[0], target, Follower())
    points.listener = None
    print(f"LAB update {progress.state.value}", flush=True)
    mistakes(marks, found.boot.kernel(other(platform.running())), ESP / FALLBACK)
    return 0


sys.exit(main())
