"""A node with two slots: a disk image with a GPT, a folder as EFI system partition and one as EFI variables; an
updater of its own (system_updater.py), the node's real agent, and a real server."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import struct
import subprocess
import sys
import time
import uuid
import zlib
from pathlib import Path
from typing import Any

from instar.core.errors import InstarError
from instar.core.journal import Begin
from instar.engine.journal import Journals
from instar.host import gpt
from instar.host.boot.efivars import GLOBAL
from instar.host.boot.finding import find
from instar.host.boot.firmware import Firmware
from instar.host.clock import Clock
from instar.host.layout import Layout
from instar.host.sockets import ask
from instar.targets.slots.records import SlotRecord, read_records, write_records
from instar.trust.bundle import HEAD, manifest_length
from instar_lab import machine as lab
from instar_lab.node import Node
from instar_lab.program import build as programs
from instar_lab.server import LabServer
from instar_server.trust.bundle import About, Built, build
from tests.node.boot.test_disks import image as kernel_image
from tests.node.updater_host import LocalConnection
from tests.node.updater_host import ask as ask_http

BLOCK = 512
FIRST = 2048  # block of the first partition
SLOT_BLOCKS = 6144  # 3 MiB
NAMES = ("ESP", "instar-system-a", "instar-system-b")
ROOT = Path(__file__).parents[2]
READY_S, STOP_S, ENDED_S = 90.0, 60.0, 120.0

SETTINGS = """\
[os]
disk = "{disk}"
esp = "{esp}"
hardware = "board other-board"
answer_s = {answer_s}
{more}
[trial]
hold_s = 0.3
lease_s = 120.0
cap_s = 180.0

[network]
rate_bytes_s = {rate}

[updater]
poll_s = 1.0
api = "{api}"
retry_floor_s = 0.1
retry_cap_s = 0.5
"""


def disk_image() -> bytearray:
    """An EFI system partition and two slots, without their contents but with both tables."""
    entries = bytearray(128 * 128)
    for number, name in enumerate(NAMES):
        first = FIRST + number * SLOT_BLOCKS
        kind = gpt.ESP.bytes_le if number == 0 else uuid.UUID(int=7).bytes_le
        entry = gpt.ENTRY.pack(
            kind,
            uuid.UUID(int=number + 1).bytes_le,
            first,
            first + SLOT_BLOCKS - 1,
            0,
            name.encode("utf-16-le"),
        )
        entries[number * 128 : number * 128 + 128] = entry
    blocks = FIRST + len(NAMES) * SLOT_BLOCKS + 64
    whole = bytearray(blocks * BLOCK)
    last = blocks - 1
    for own, other, table in ((1, last, 2), (last, 1, last - 33)):
        fields = (gpt.SIGNATURE, 0x10000, 92, 0, 0, own, other, 34, last - 34, bytes(16), table, 128, 128)
        header = bytearray(gpt.HEADER.pack(*fields, zlib.crc32(entries)))
        struct.pack_into("<I", header, 16, zlib.crc32(header))
        whole[own * BLOCK : own * BLOCK + 92] = header
        whole[table * BLOCK : table * BLOCK + len(entries)] = entries
    return whole


class Image:
    """One version of the system, and its bundle. Most of each root is the same in all of them."""

    def __init__(self, folder: Path, version: str, new: int = 300 << 10, hardware: str = "board") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.version = version
        seed = int.from_bytes(version.encode(), "big")
        self.root = random.Random(1).randbytes(400 << 10) + random.Random(seed).randbytes(new)
        line = f"quiet roothash={hashlib.sha256(self.root).hexdigest()}".encode()
        self.kernel = kernel_image({".linux": b"k" * 9000, ".initrd": b"i" * 9000, ".cmdline": line})
        root, kernel = folder / f"{version}.root", folder / f"{version}.efi"
        self.bundle = folder / f"lab-{version}.bundle"
        root.write_bytes(self.root)
        kernel.write_bytes(self.kernel)
        self.built: Built = build(About("lab", version, (hardware,), "x86_64"), root, kernel, self.bundle)

    @property
    def manifest(self) -> bytes:
        data = self.bundle.read_bytes()
        return data[HEAD : HEAD + manifest_length(data[:HEAD])]

    @property
    def digest(self) -> str:
        return str(self.built.custom["digest"])


class Machine:
    """`folder` holds everything below the operating system. It runs `image` from slot A at first."""

    def __init__(self, folder: Path, state: Path, image: Image) -> None:
        self.folder, self.records_file = folder, state / "os/slots.json"
        self.disk, self.esp, self.efivars = folder / "disk.img", folder / "esp", folder / "efivars"
        for made in (self.esp, self.efivars, folder / "devices/7:0/loop"):
            made.mkdir(parents=True)
        (self.efivars / f"Timeout-{GLOBAL}").write_bytes(b"\7\0\0\0\1\0")
        data = disk_image()
        start = (FIRST + SLOT_BLOCKS) * BLOCK
        data[start : start + len(image.root)] = image.root
        self.disk.write_bytes(data)
        found = find(self.disk, NAMES[1:], self.esp, state / "os/preferred", self.efivars)
        self.slots, self.boot = found.slots, found.boot
        assert isinstance(self.boot, Firmware)
        self.boot.kernel("a").parent.mkdir(parents=True)
        self.boot.kernel("a").write_bytes(image.kernel)
        self.boot.prefer("a")
        record = SlotRecord(image.version, image.digest, "good", len(image.root), cold_boot_seen=True)
        write_records(self.records_file, {"a": record})
        (self.records_file.parent / "a.manifest").write_bytes(image.manifest)
        self.power_on("a")

    def power_on(self, slot: str, by: str = "firmware") -> None:
        """From now on `slot` is what is mounted, in another boot."""
        (self.folder / "boot_id").write_text(str(uuid.uuid4()))
        (self.folder / "mounts").write_text("20 1 7:0 / / ro - erofs /dev/loop0 ro\n")
        loop = self.folder / "devices/7:0/loop"
        (loop / "backing_file").write_text(f"{self.disk.resolve()}\n")
        (loop / "offset").write_text(f"{self.slots[slot].offset}\n")
        (self.folder / "cmdline").write_text("quiet" + (" instar.via=kexec" if by == "kexec" else ""))
        (self.folder / "down").unlink(missing_ok=True)

    @property
    def down(self) -> str:
        """How the machine was told to go down; '' while it was not."""
        path = self.folder / "down"
        return path.read_text() if path.exists() else ""

    def slot_data(self, name: str) -> bytes:
        slot = self.slots[name]
        with self.disk.open("rb") as file:
            file.seek(slot.offset)
            return file.read(slot.size)

    def records(self) -> dict[str, SlotRecord]:
        return read_records(self.records_file)


class Hall:
    """The server, with the node program and some bundles."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, LabServer(folder / "server")
        self.program = programs.build("1.0.0")
        self.images: dict[str, Image] = {}

    def open(self) -> None:
        self.server.create()
        self.server.start()
        self.server.publish(self.program)
        made = [
            ("1.0.0", "board", 300),
            ("1.1.0", "board", 300),
            ("1.2.0", "board", 1500),
            ("9.0.0", "toaster", 9),
        ]
        for version, hardware, new in made:
            self.images[version] = Image(self.folder / "images", version, new << 10, hardware)
            self.server.publish_file(self.images[version].built, self.images[version].bundle)

    def close(self) -> None:
        self.server.close()


class SystemHost:
    """One node of the hall's server. Its agent is started by its launcher, its updater by us."""

    def __init__(
        self, hall: Hall, folder: Path, rate: int = 0, answer_s: float = 0.3, more: str = "", api: str = ""
    ) -> None:
        self.hall, self.folder, self.node = hall, folder, Node(folder / "n")
        self.layout: Layout = self.node.layout
        self.log = folder / "updater.log"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        program = folder / "handed.pyz"
        hall.server.hand_out(hall.program, hall.server.token(1), program)
        where = folder / "m"
        text = SETTINGS.format(
            disk=where / "disk.img", esp=where / "esp", answer_s=answer_s, rate=rate, more=more, api=api
        )
        self.node.install(program, text, start=False)
        self.machine = Machine(where, self.layout.state, hall.images["1.0.0"])

    # --- processes

    def start(self) -> None:
        launch = [sys.executable, "-I", "-S", str(self.layout.launcher), "launch", "agent"]
        self._start("agent", [*launch, "--state", str(self.layout.state)])
        self.start_updater()

    def start_updater(self) -> None:
        program = str(self.layout.line("updater").current / "instar.pyz")
        words = [sys.executable, "-m", "tests.node.system_updater", program, str(self.machine.folder)]
        self._start("updater", [*words, "--state", str(self.layout.state)])
        lab.wait_for(self._answers, "an updater that answers", READY_S, self.said, every_s=0.05)

    def _start(self, role: str, words: list[str]) -> None:
        with (self.folder / f"{role}.log").open("ab") as log:
            self._processes[role] = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, start_new_session=True
            )

    def _answers(self) -> bool:
        process = self._processes["updater"]
        assert process.poll() is None, self.said()
        try:
            return self.call("GET", "/v1/health")[0] == 200
        except OSError:
            return False

    def end_updater(self, with_signal: int = signal.SIGTERM) -> int:
        """By what the machine's way down sends. Its exit status."""
        process = self._processes.pop("updater")
        process.send_signal(with_signal)
        return process.wait(STOP_S)

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait(STOP_S)
        self.node.end(0.5)

    def said(self) -> str:
        return f"{lab.tail(self.log, 40)}\n{lab.tail(self.folder / 'agent.log', 15)}"

    # --- talking

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = LocalConnection(self.layout.socket("updater"))
        try:
            return ask_http(connection, method, path, body)
        finally:
            connection.close()

    def look(self) -> None:
        ask(self.layout.socket("updater"), {"do": "look"}, STOP_S)

    def connected(self) -> None:
        def is_connected() -> bool:
            try:
                return bool(ask(self.layout.socket("agent"), {"do": "health"}, 2.0).get("connected"))
            except InstarError:
                return False

        lab.wait_for(is_connected, "a connected agent", READY_S, self.said)
        lab.wait_for(lambda: self.system()["told"], "a report of the slots", READY_S, self.said)

    def update_os(self, bundle: str, activation: str, **more: Any) -> dict[str, Any]:
        """By the server."""
        body = {"bundle": bundle, "activation": activation, **more}
        made: dict[str, Any] = self.hall.server.api.post(f"/nodes/{self.node.id}/update-os", body)
        self.look()
        return made

    def system(self) -> dict[str, Any]:
        """As the server shows it."""
        found: dict[str, Any] = self.hall.server.api.get(f"/nodes/{self.node.id}/system")
        return found

    def ended(self, order: str, within_s: float = ENDED_S) -> dict[str, Any]:
        """The server's row, once it has ended."""

        def row() -> dict[str, Any] | None:
            found = next(each for each in self.system()["updates"] if each["id"] == order)
            return found if found["state"] != "open" else None

        return lab.wait_for(row, "an end of the update", within_s, self.said, every_s=0.2)

    def goes_down(self, within_s: float = ENDED_S) -> str:
        return lab.wait_for(lambda: self.machine.down, "a machine going down", within_s, self.said)

    def transactions(self) -> list[dict[str, Any]]:
        """Of line os, newest first."""
        found = self.call("GET", "/v1/transactions")[1]["transactions"]
        return [each for each in found if each["line"] == "os"]

    def begins(self) -> list[Begin]:
        """Of line os, oldest first, from the disk."""
        found = Journals(self.layout.journal, Clock()).read_all()
        return [journal.progress.begin for journal in found if journal.progress.begin.line == "os"]

    def finished(self, tx: str, within_s: float = ENDED_S) -> dict[str, Any]:
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            status, found = self.call("GET", f"/v1/transactions/{tx}?wait_s=5")
            if status == 200 and found["finished"]:
                return dict(found)
        raise AssertionError(f"{tx} has no end\n{self.said()}\n{json.dumps(self.transactions(), indent=1)}")
