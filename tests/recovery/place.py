"""A real node in a scratch folder, kept by the real keeper, and ways to break it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instar.host import processes
from instar.host.clock import Clock
from instar.host.layout import LINES, Layout
from instar.host.line import Line
from instar.trust.program import program_digest
from instar_lab import machine
from instar_lab.program.build import Program
from instar_server.trust.pack import Release, pack_release
from tests.agent.fleet import NODE, node_names
from tests.recovery.gateway import Gateway

SETTINGS = """
[trial]
hold_s = 0.2
lease_s = 12.0
cap_s = 20.0
[probe]
tries = 20
every_s = 0.5
[updater]
api = ""
retry_floor_s = 0.2
[wake]
port = 0
"""
FLAGS = (sys.executable, "-I", "-S")


@dataclass
class Ended:
    """What a core said, and how it ended."""

    status: int
    said: list[dict[str, Any]]
    stderr: str

    @property
    def end(self) -> dict[str, Any]:
        assert [word for word in self.said if "ended" in word] == self.said[-1:], (self.said, self.stderr)
        return dict(self.said[-1]["ended"])

    @property
    def phases(self) -> list[str]:
        found = [word["progress"]["phase"] for word in self.said if "progress" in word]
        return list(dict.fromkeys(found))

    @property
    def downloaded(self) -> bool:
        return any("downloaded" in word for word in self.said)


@dataclass
class Place:
    state: Path
    gateway: Gateway
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layout, self.clock = Layout(self.state), Clock()

    # --- making it

    def install(self, program: Program, settings: str = SETTINGS) -> None:
        """As an installed node lies on the disk, on `program`."""
        certificate, key = self.gateway.authority.issue(node_names())
        for folder in (self.layout.identity, self.layout.run, self.layout.journal, self.layout.staging):
            folder.mkdir(parents=True, exist_ok=True)
        self.layout.key.write_bytes(key)
        self.layout.certificate.write_bytes(certificate)
        self.layout.ca.write_bytes(self.gateway.authority.pem)
        record = {"v": 1, "node": NODE, "server": self.gateway.url, "group": "default", "enrolled": 1.0}
        self.layout.node.write_text(json.dumps(record))
        self.layout.config.write_text(settings)
        self.layout.launcher.parent.mkdir(parents=True, exist_ok=True)
        self.layout.launcher.write_bytes(program.data)
        for role in LINES:
            self.put(role, program)

    def put(self, role: str, program: Program, current: bool = True) -> None:
        line = Line(self.layout.line(role))
        folder = line.folder(program.release)
        folder.mkdir(parents=True, exist_ok=True)
        manifest = _member(pack_release(program.data, program.version), "manifest.json")
        (folder / "manifest.json").write_bytes(manifest)
        (folder / "instar.pyz").write_bytes(program.data)
        line.mark_valid(program.release)
        if current:
            line.activate(program.release, fallback=line.current())

    # --- running it

    def command(self, *words: str) -> list[str]:
        return [*FLAGS, str(self.layout.launcher), *words, "--state", str(self.state)]

    def keep(self) -> None:
        """Start the keeper, which starts agent and updater."""
        with (self.layout.run / "keeper.log").open("ab") as log:
            child = subprocess.Popen(
                self.command("keep"), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.started.append(child)

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the launcher of the agent, without a keeper."""
        with (self.layout.run / "agent.log").open("ab") as log:
            words = [*FLAGS, str(self.layout.launcher), "launch", "agent", "--state", str(self.state)]
            self.started.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        return self.started[-1]

    def order(self, release: Release, roles: list[str], **changes: Any) -> Path:
        folder, _, name = release.path.rpartition("/")
        body = {
            "v": 1,
            "id": "r-1",
            "url": f"/v1/targets/{folder}/{release.sha256}.{name}",
            "sha384": hashlib.sha384(release.archive).hexdigest(),
            "version": release.custom["version"],
            "digest": release.digest,
            "target": release.path,
            "lines": roles,
            "pin": self.gateway.pin,
            "server": self.gateway.url,
            **changes,
        }
        path = self.state / "order.json"
        path.write_text(json.dumps(body))
        return path

    def start_core(self, core: Path, order: Path) -> subprocess.Popen[bytes]:
        words = [*FLAGS, str(core), "--state", str(self.state), "--order", str(order)]
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            cwd="/", start_new_session=True,
        )  # fmt: skip
        self.started.append(child)
        return child

    async def run_core(self, core: Path, order: Path, within_s: float = 240.0) -> Ended:
        child = self.start_core(core, order)
        out, err = await asyncio.to_thread(child.communicate, timeout=within_s)
        return Ended(child.returncode, [json.loads(line) for line in out.splitlines()], err.decode())

    def end(self) -> None:
        for child in self.started:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            child.wait()
        machine.end_all_naming(self.state, grace_s=0.5)
        for pid in processes_in(self.state):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{machine.tail(path, 40)}" for path in sorted(self.layout.run.glob("*.log"))
        )

    # --- breaking it

    def zero(self, role: str) -> None:
        """Every file of every release of the line filled with zeros."""
        for path in self.layout.line(role).releases.rglob("*"):
            if path.is_file():
                size = path.stat().st_size
                path.chmod(0o600)
                path.write_bytes(bytes(size))

    def delete(self, role: str) -> None:
        """The whole line, links and all."""
        shutil.rmtree(self.layout.line(role).folder)

    # --- looking at it

    def pid(self, role: str) -> int:
        """Who plays the role by its record; 0 when nobody does."""
        process = processes.recorded(self.layout.process(role))
        return process.pid if process and processes.alive(process, self.clock.boot_id()) else 0

    def runs(self, role: str) -> str:
        """The digest of the program that the role's process executes; '' when none runs."""
        words = machine.command_line(self.pid(role)) if self.pid(role) else ()
        program = next((Path(word) for word in words if word.endswith("/instar.pyz")), None)
        if program is None or role not in words or "launch" in words:
            return ""
        with contextlib.suppress(OSError):
            return program_digest(program.read_bytes())
        return ""

    def is_on(self, program: Program, roles: tuple[str, ...] = LINES) -> bool:
        """Whether each role runs `program`, from a release that is whole."""
        for role in roles:
            line = Line(self.layout.line(role))
            if self.runs(role) != program.digest or not line.is_valid(program.release):
                return False
            if line.current() != program.release:
                return False
        return True

    async def until(self, true: Callable[[], object], within_s: float = 90.0) -> None:
        end = time.monotonic() + within_s
        while not true():
            assert time.monotonic() < end, f"it did not come to it in time\n{self.logs()}"
            await asyncio.sleep(0.05)


def _member(release: Release, name: str) -> bytes:
    import io
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(release.archive), mode="r:gz") as tar:
        file = tar.extractfile(name)
        assert file is not None
        return file.read()


def processes_in(state: Path) -> list[int]:
    """Cores, too, which do not run from the state folder."""
    return [seen.pid for seen in machine.processes() if str(state) in seen.words]
