"""One real server with a few releases for all tests of a worker; nodes of their own, and gone, for each test."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from instar.core.errors import InstarError
from instar.host.sockets import ask
from instar_lab import machine
from instar_lab.node import Node
from instar_lab.program import build
from instar_lab.server import LabServer
from instar_server.trust.pack import Release
from tests.e2e.mirror import Mirror, Proxy

OLD, NEW, ALTERED = "1.0.0", "1.1.0", "1.2.0"
LINES = ("updater", "agent")
FINAL = ("confirmed", "reverted")
SETTLED_S = 120.0

# As in the kill range: short, but the order of everything is that of a real node.
SETTINGS = """\
[trial]
hold_s = {hold_s}
lease_s = {lease_s}
cap_s = {cap_s}
attempts = 3

[rehearsal]
within_s = 60.0

[updater]
retry_floor_s = 0.1
retry_cap_s = 0.5
poll_s = {poll_s}
"""
SERVER_SETTINGS = "look_floor_s = 0.2\n"


def settings(
    hold_s: float = 0.3, lease_s: float = 60.0, cap_s: float = 120.0, poll_s: float = 2.0, more: str = ""
) -> str:
    return SETTINGS.format(hold_s=hold_s, lease_s=lease_s, cap_s=cap_s, poll_s=poll_s) + more


# The server is a process of its own, and must find the packages where this one found them.
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path.endswith("/src"))


class Hall:
    """The server, the releases it has, and what a test needs to make nodes and strangers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = LabServer(folder / "server")
        self.programs: dict[str, build.Program] = {}
        self.releases: dict[str, Release] = {}

    def open(self) -> None:
        self.server.create()
        with self.server.layout.config.open("a") as file:
            file.write(SERVER_SETTINGS)
        self.server.start()
        for version in (OLD, NEW, ALTERED):
            self.publish(version)
        self.server.alter(self.releases[ALTERED])

    def publish(self, version: str) -> None:
        self.programs[version] = build.build(version)
        self.releases[version] = self.server.publish(self.programs[version])

    def close(self) -> None:
        self.server.close()
        machine.end_all_naming(self.folder, grace_s=1.0)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def hall() -> Iterator[Hall]:
    made = Hall(Path(tempfile.mkdtemp(prefix="ie2e-", dir="/tmp")))
    try:
        made.open()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The node program as it is built, without any configuration."""
    path = tmp_path_factory.mktemp("program") / "instar.pyz"
    build.write(build.build(OLD), path)
    return path


class Stage:
    """One test's nodes, in a group of their own, and whatever stands before them."""

    def __init__(self, hall: Hall, folder: Path) -> None:
        self.hall, self.server, self.folder = hall, hall.server, folder
        self.group = f"g-{uuid.uuid4().hex[:12]}"
        self.server.api.post("/groups", {"name": self.group})
        self.closing: list[Callable[[], object]] = []

    def handed(self, uses: int = 10, version: str = OLD) -> Path:
        """The program as the server hands it out."""
        path = self.folder / f"instar-{uuid.uuid4().hex[:6]}.pyz"
        self.server.hand_out(self.hall.programs[version], self.server.token(uses, self.group), path)
        return path

    def node(self, text: str = "", start: bool = True, folder: Path | None = None) -> Node:
        node = Node(folder or self.folder / f"n{len(self.closing)}")
        self.closing.append(lambda: node.end(0.5))
        node.install(self.handed(), text or settings(), start)
        if start:
            self.connected(node)
        return node

    def mirror(self) -> Mirror:
        mirror = Mirror(self.server.gateway(), self.server.layout.certificate, self.server.ca)
        self.closing.append(mirror.close)
        return mirror

    def proxy(self) -> Proxy:
        proxy = Proxy()
        self.closing.append(proxy.close)
        return proxy

    def mirrored(self, text: str = "", start: bool = True) -> tuple[Node, Mirror]:
        """A node that sees its server through a mirror."""
        node, mirror = self.node(text, start=False), self.mirror()
        mirror.stand_before(node.layout)
        if start:
            node.cli("start")
            self.connected(node)
        return node, mirror

    def want(self, version: str, lines: tuple[str, ...] = LINES) -> None:
        self.server.want(version, lines, self.group)

    def connected(self, node: Node, within_s: float = 60.0) -> None:
        """Wait until the agent is, and the updater answers."""
        machine.wait_for(lambda: health(node).get("connected"), "a connected agent", within_s, node.logs)
        machine.wait_for(lambda: health(node, "updater"), "an updater that answers", within_s, node.logs)

    def close(self) -> None:
        for each in reversed(self.closing):
            with contextlib.suppress(Exception):
                each()


@pytest.fixture
def stage(hall: Hall) -> Iterator[Stage]:
    folder = Path(tempfile.mkdtemp(prefix="ie-", dir="/tmp"))
    made = Stage(hall, folder)
    try:
        yield made
    finally:
        made.close()
        machine.end_all_naming(folder, grace_s=0.5)
        shutil.rmtree(folder, ignore_errors=True)
        hall.server.check()  # whatever a test did, the server is up


def said(node: Node, role: str, do: str, **more: Any) -> dict[str, Any]:
    return ask(node.layout.socket(role), {"do": do, **more}, 5.0)


def health(node: Node, role: str = "agent") -> dict[str, Any]:
    """{} while it does not answer."""
    try:
        return said(node, role, "health")
    except InstarError:
        return {}


def look(node: Node) -> None:
    """Have the updater look now."""
    with contextlib.suppress(InstarError):
        said(node, "updater", "look")


def settled(node: Node, count: int, within_s: float = SETTLED_S) -> list[dict[str, Any]]:
    """Wait for `count` transactions that have all ended; they are returned, oldest first."""

    def done() -> list[dict[str, Any]] | None:
        found = node.history()
        ended = [entry for entry in found if entry["state"] in FINAL]
        return found if len(ended) == len(found) and len(found) >= count else None

    def instead() -> str:
        return f"{node.cli('history')}\n{node.logs(25)}"

    return machine.wait_for(done, f"{count} ended transactions", within_s, instead, every_s=0.3)


def updates(node: Node, version: str, lines: tuple[str, ...] = LINES, before: int = 0) -> None:
    """Wait until the wanted release runs on these lines, by confirmed transactions."""
    look(node)
    found = settled(node, before + len(lines))
    assert [(e["line"], e["version"], e["state"]) for e in found[before:]] == [
        (line, version, "confirmed") for line in lines
    ], node.cli("history") + node.logs(25)


def log_has(node: Node, role: str, words: str, within_s: float = 60.0) -> str:
    """Wait for a line of a role's log that holds `words`; returns it."""
    path = node.layout.run / f"{role}.log"

    def line() -> str | None:
        text = path.read_text(errors="replace") if path.exists() else ""
        return next((each for each in text.splitlines() if words in each), None)

    return machine.wait_for(line, f"{words!r} in {role}.log", within_s, lambda: machine.tail(path, 30))


def command(program: Path, *words: str, timeout_s: float = 180.0) -> subprocess.CompletedProcess[str]:
    """Run a program file's command line and return how it ended, well or not."""
    line = [sys.executable, "-I", "-S", str(program), *words]
    return subprocess.run(
        line, capture_output=True, text=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL
    )


def cli(node: Node, *words: str) -> subprocess.CompletedProcess[str]:
    return command(node.layout.launcher, *words, "--state", str(node.state))


def code_of(done: subprocess.CompletedProcess[str]) -> str:
    """The stable code in a `--json` answer that says no."""
    return str(json.loads(done.stdout)["error"]["code"])
