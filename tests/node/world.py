"""A node without a machine: real files, but a clock, a server and a service manager made of memory.

`Node` holds one line of releases per role. Its agent is a `FakeAgent`: a thread that answers on the
real Unix socket as a release of its kind would. Nothing here replaces a part of the code under test.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import socket
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from instar.core.errors import InstarError, ServerUnreachable
from instar.core.journal import Begin, Progress, Reason
from instar.core.releases import Release
from instar.core.settings import RehearsalSettings, Settings, TrialSettings
from instar.engine.journal import Journal, Journals
from instar.host import processes
from instar.host.clock import Clock
from instar.host.files import DISK, Disk
from instar.host.layout import LINES, Layout
from instar.host.line import Line
from instar.host.program import Program
from instar.recovery import launch
from instar.targets.agent_release import AgentRelease
from instar.targets.kit import Kit, TrustedTarget, Verdict
from instar.trust.program import program_digest

GOOD = "import sys\nsys.exit(0)\n"
PASS, WAIT = Verdict("pass", Reason("", "")), Verdict("wait", Reason("", ""))


class Unsynced(Disk):
    """The same files without the syncs: for many runs that no power cut ends."""

    def write_new(self, path: Path, data: bytes, mode: int) -> None:
        path.write_bytes(data)
        path.chmod(mode)

    def append(self, path: Path, data: bytes, mode: int) -> None:
        with path.open("ab") as file:
            file.write(data)

    def truncate(self, path: Path, size: int) -> None:
        os.truncate(path, size)

    def sync_folder(self, path: Path) -> None:
        return

    def sync_file(self, path: Path) -> None:
        return


UNSYNCED = Unsynced()

# --- releases


def program(text: str = GOOD, version: str = "1.0.0") -> bytes:
    """A zipapp that runs `text`; the version makes its digest its own."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("__main__.py"), f"VERSION = {version!r}\n{text}")
    return file.getvalue()


def manifest(files: dict[str, bytes], version: str, digest: str, **changes: Any) -> bytes:
    listed = [
        {"path": p, "size": len(b), "sha256": hashlib.sha256(b).hexdigest(), "mode": "0644"}
        for p, b in files.items()
    ]
    body = {"format": 1, "name": "instar", "version": version, "program_digest": digest, "files": listed}
    return json.dumps({**body, **changes}).encode()


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data), link
    return info, data


def tar_gz(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return gzip.compress(file.getvalue(), mtime=0)


@dataclass(frozen=True)
class Built:
    """One release as the operator made it."""

    release: Release
    files: dict[str, bytes]
    manifest: bytes
    archive: bytes

    @property
    def name(self) -> str:
        return self.release.name


def build(version: str, text: str = GOOD) -> Built:
    data = program(text, version)
    files = {"instar.pyz": data, "doc/notes.txt": b"notes of " + version.encode()}
    digest = program_digest(data)
    said = manifest(files, version, digest)
    members = [member("manifest.json", said), *(member(p, b) for p, b in files.items())]
    return Built(Release(version, digest), files, said, tar_gz(members))


def put(line: Line, built: Built) -> None:
    """Put a release on the disk, valid, as an install does."""
    folder = line.folder(built.name)
    for path, data in {**built.files, "manifest.json": built.manifest}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    line.mark_valid(built.name)


# --- the clock, the server, the agent


class FakeClock(Clock):
    """Time passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.boot, self.began = "boot-1", 0.0
        self.on_sleep: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def boottime(self) -> float:
        return self.now

    def booted(self) -> float:
        return self.began

    def wall(self) -> float:
        return 1_700_000_000.0 + self.now

    def boot_id(self) -> str:
        return self.boot

    def sleep(self, seconds: float) -> None:
        assert seconds > 0, "a wait without a floor"
        self.now += seconds
        self.on_sleep()

    def reboot(self) -> None:
        self.boot, self.now = f"{self.boot}+", 5.0

    def restart_container(self) -> None:
        """A boot of its own, under a clock that goes on."""
        self.boot, self.began, self.now = f"{self.boot}+", self.now + 2.0, self.now + 5.0


class FakeSource:
    """Serves bytes. `cut_at` holds the offsets at which one answer ends; the next one goes on."""

    def __init__(self, data: bytes, chunk: int = 4096) -> None:
        self.data, self.chunk = data, chunk
        self.cut_at: list[int] = []
        self.ranges = True  # whether it understands Range
        self.asked: list[int] = []
        self.dead = False

    @contextlib.contextmanager
    def stream(
        self, path: str, start: int, stop: int | None = None
    ) -> Iterator[tuple[bool, Iterator[bytes]]]:
        self.asked.append(start)
        if self.dead:
            raise ServerUnreachable("server-unreachable", "cannot reach it")
        begin = start if self.ranges else 0
        yield self.ranges and start > 0, self._chunks(begin)

    def _chunks(self, at: int) -> Iterator[bytes]:
        end = self.cut_at.pop(0) if self.cut_at else len(self.data)
        while at < end:
            chunk = self.data[at : min(end, at + self.chunk)]
            at += len(chunk)
            yield chunk
        if end < len(self.data):
            raise ServerUnreachable("cut-off", "cannot read on")


class FakeServer:
    """Implements `instar.targets.kit.Server` from what the tests set."""

    def __init__(self, offered: Built) -> None:
        self.offered = offered
        self.served = FakeSource(offered.archive)
        self.verdicts: dict[str, Verdict] = {"rehearsal": PASS, "trial": PASS}
        self.fault: InstarError | None = None  # raised instead of any answer
        self.metadata: list[Path | None] = []  # where they were to come from, question by question
        self.sha256 = hashlib.sha256(offered.archive).hexdigest()

    def trusted_target(self, target: str, metadata: Path | None = None) -> TrustedTarget:
        self.metadata.append(metadata)
        if metadata is None:
            self._may_fail()
        archive = self.offered.archive
        return TrustedTarget(f"/v1/{target}", len(archive), self.sha256, self.custom())

    def custom(self) -> dict[str, Any]:
        r = self.offered.release
        return {"version": r.version, "program_digest": r.digest}

    def verdict(self, line: str, phase: str, tx: str, digest: str, wait_s: float) -> Verdict:
        self._may_fail()
        return self.verdicts[phase]

    def elsewhere(self, url: str) -> tuple[FakeSource, str]:
        raise AssertionError(f"asked for {url}")

    def source(self) -> FakeSource:
        return self.served

    def _may_fail(self) -> None:
        if self.fault is not None:
            raise self.fault


class FakeAgent:
    """Answers on the agent's socket. What it answers is asked for each time."""

    def __init__(self, path: Path, answer: Callable[[], dict[str, Any] | bytes | None]) -> None:
        self.answer = answer
        self.request: dict[str, Any] = {}  # the one that is being answered
        path.parent.mkdir(parents=True, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                self.request = json.loads(connection.recv(65_536))
                said = self.answer()
                if said is not None:
                    data = (
                        said if isinstance(said, bytes) else json.dumps({"ok": True, **said}).encode() + b"\n"
                    )
                    connection.sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


@dataclass
class Machine:
    """Implements `Services`: starting a role means that the real launcher chooses its release."""

    node: Node
    name: str = "memory"
    running: dict[str, str] = field(default_factory=dict)
    starts: list[str] = field(default_factory=list)
    pid: int = 100_000_000  # beyond any real one, so that nothing real is ever signalled

    def restart(self, role: str) -> None:
        self.stop(role)
        self.start(role)

    def stop(self, role: str) -> None:
        self.running.pop(role, None)

    def start(self, role: str) -> None:
        if role in self.running:
            return
        release = launch.choose(Line(self.node.layout.line(role), self.node.disk), self.node.clock)
        self.starts.append(release)
        self.running[role] = release
        self.pid += 1

    def look_after(self) -> None:
        """What a service manager does all the time: start what ended."""
        if "agent" in self.running and self.running["agent"] in self.node.crashing:
            self.restart("agent")


class Quiet:
    """A follower that keeps what it was told."""

    def __init__(self) -> None:
        self.states: list[str] = []

    def changed(self, progress: Progress) -> None:
        self.states.append(progress.state.value)


class Node:
    """One node's state folder, on release 1.0.0 (`old`), with 1.1.0 (`new`) on offer."""

    def __init__(
        self, state: Path, disk: Disk = DISK, new: Built | None = None, install: bool = True
    ) -> None:
        self.layout, self.disk = Layout(state), disk
        self.clock = FakeClock()
        self.old, self.new = build("1.0.0"), new or build("1.1.0")
        self.server = FakeServer(self.new)
        self.machine = Machine(self)
        self.clock.on_sleep = self.machine.look_after
        self.crashing: set[str] = set()  # releases that end at once
        self.modules = {"base": "ok"}
        self.connected = True
        self.said: Callable[[], dict[str, Any] | bytes | None] = self._healthy
        self.agent: FakeAgent | None = None
        if install:
            self._install()

    def _install(self) -> None:
        for folder in ("journal", "staging", "run"):
            (self.layout.state / folder).mkdir(parents=True, exist_ok=True)
        for role in LINES:
            line = Line(self.layout.line(role))
            line.layout.releases.mkdir(parents=True, exist_ok=True)
            if not line.current():
                put(line, self.old)
                line.activate(self.old.name, fallback="")

    def close(self) -> None:
        if self.agent is not None:
            self.agent.close()

    def boot(self) -> None:
        """Start the agent, and whoever answers for it."""
        if self.agent is None:
            self.agent = FakeAgent(self.layout.socket("agent"), lambda: self.said())
        self.machine.start("agent")

    def _healthy(self) -> dict[str, Any] | None:
        release = self.machine.running.get("agent", "")
        built = next((b for b in (self.old, self.new) if b.name == release), None)
        if built is None or release in self.crashing:
            return None
        about = {"pid": self.machine.pid, **{n: getattr(built.release, n) for n in ("version", "digest")}}
        return {**about, "connected": self.connected, "modules": dict(self.modules)}

    @property
    def line(self) -> Line:
        return Line(self.layout.line("agent"), self.disk)

    @property
    def journals(self) -> Journals:
        return Journals(self.layout.journal, self.clock, self.disk)

    @property
    def settings(self) -> Settings:
        trial = TrialSettings(hold_s=0.05, lease_s=2.0, cap_s=20.0)
        return Settings(trial=trial, rehearsal=RehearsalSettings(within_s=60.0))

    def program(self) -> Program:
        """What the updater runs from."""
        line = Line(self.layout.line("agent"))
        return Program("1.0.0", self.old.release.digest, line.program(self.old.name), self.old.name)

    def kit(self) -> Kit:
        return Kit(
            self.layout,
            self.clock,
            self.machine,
            self.server,
            self.settings,
            self.program(),
            self.clock.sleep,
            self.disk,
        )

    def target(self) -> AgentRelease:
        return AgentRelease(self.kit())

    def begin(self, tx: str = "tx-1", cause: str = "wish", built: Built | None = None) -> Journal:
        release, line = (built or self.new).release, self.line
        target = "node/new.tar.gz" if cause == "wish" else ""
        return self.journals.begin(
            Begin(
                tx, "agent", release.version, release.digest, target, line.current(), line.previous(), cause
            )
        )

    def record(self, role: str, release: str, pid: int | None = None) -> processes.Process:
        """Write the record of a process, this one unless told."""
        process = processes.this_process(self.clock.boot_id(), release)
        process = replace(process, pid=pid or os.getpid())
        processes.record(self.layout.process(role), process)
        return process
