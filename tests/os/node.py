"""A node in a container, as its administrator and its server see it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from instar.core.errors import InstarError
from instar.host.layout import Layout
from instar_lab import machine
from instar_lab.container import Container
from instar_lab.program import build
from instar_lab.server import LabServer

LINES = ("updater", "agent")  # in the order of an update
UNITS = ("instar-agent.service", "instar-updater.service", "instar-updater.socket", "instar-updater.timer")
AGENT, UPDATER, SOCKET, TIMER = UNITS
API_SOCKET = "instar-updater-api.socket"
FINAL = ("confirmed", "reverted")
SETTLED_S = 120.0
STATE = "/var/lib/instar"
PLAN = "lab-kill-plan.json"
PROGRAM = "/root/instar.pyz"

SETTINGS = """\
[trial]
hold_s = {hold_s}
lease_s = 30.0
cap_s = 60.0
attempts = 3

[updater]
api = "{api}"
retry_floor_s = 0.1
retry_cap_s = 0.5
"""


class OsNode:
    api = ""  # containers share this machine's ports: only who asks for the updater's API gets it

    def __init__(
        self, container: Container, server: LabServer, programs: Mapping[str, build.Program], group: str
    ) -> None:
        self.container, self.server, self.programs, self.group = container, server, programs, group
        self.layout = Layout(container.root / STATE.lstrip("/"))  # as seen from outside

    # --- doing

    def hand_out(self, version: str) -> None:
        """Have the server hand the program out, with its address and a token inside."""
        path = self.container.root / PROGRAM.lstrip("/")
        self.server.hand_out(self.programs[version], self.server.token(1, self.group), path)

    def install(self, version: str, *options: str) -> str:
        """Install a program that the server hands out, as its README says; what that printed."""
        self.hand_out(version)
        return self.container.do("python3", PROGRAM, "install", "--api", self.api, *options)

    def set_up(self, version: str, hold_s: float = 0.5, plan: Mapping[str, Any] | None = None) -> None:
        """Install with short times, start, and wait for the agent on its channel.

        `plan` is for the program that kills itself (instar_lab.program.wrappers.killed_at).
        """
        self.install(version, "--no-start")
        self.layout.config.write_text(SETTINGS.format(hold_s=hold_s, api=self.api))
        if plan is not None:
            (self.layout.state / PLAN).write_text(json.dumps(plan))
        self.cli("start")
        self.connected()

    def cli(self, *words: str) -> str:
        return self.container.do("python3", f"{STATE}/launcher/instar.pyz", *words)

    def want(self, version: str, *lines: str) -> None:
        self.server.want(version, lines or LINES, self.group)

    # --- looking

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.cli("status", "--json")))

    def history(self) -> list[dict[str, Any]]:
        return list(json.loads(self.cli("history", "--json"))["transactions"])

    @property
    def id(self) -> str:
        return str(json.loads(self.layout.node.read_bytes())["node"])

    def connected_since(self) -> float:
        """Unix time by the server; 0 when the agent is not connected."""
        return next(seen.connected_since for seen in self.server.nodes() if seen.id == self.id)

    def connected(self, after: float = 0.0) -> float:
        """Wait until the server has the agent on a channel that began after `after`; when it began."""
        return machine.wait_for(
            lambda: since if (since := self.connected_since()) > after else None,
            "a connected agent", 60.0, self.words,
        )  # fmt: skip

    def settled(self, count: int, within_s: float = SETTLED_S) -> list[dict[str, Any]]:
        """Wait for `count` transactions that have all ended; they are returned, oldest first."""

        def done() -> list[dict[str, Any]] | None:
            try:
                found = self.history()
            except InstarError:
                return None
            ended = [each for each in found if each["state"] in FINAL]
            return found if len(ended) == len(found) and len(found) >= count else None

        return machine.wait_for(done, f"{count} ended transactions", within_s, self.words, every_s=0.3)

    def pid(self, unit: str) -> int:
        """The unit's main process as seen inside; 0 when it is not running."""
        return int(self.container.property(unit, "MainPID"))

    def active(self, unit: str) -> str:
        return self.container.property(unit, "ActiveState")

    def versions(self) -> dict[str, str]:
        """Role -> version that the server has heard from the node itself, by digest."""
        names = {program.digest: version for version, program in self.programs.items()}
        seen = next(each for each in self.server.nodes() if each.id == self.id)
        return {"agent": names.get(seen.agent, "?"), "updater": names.get(seen.updater, "?")}

    def residents(self) -> list[str]:
        """The roles that processes inside play, by their command lines; rehearsals are not among them."""
        return sorted(role for seen in self.container.processes() for role in LINES if plays(seen, role))

    def words(self) -> str:
        """What both roles said last, for an error message."""
        said = [
            f"{line.wall:.3f} {unit} {line.source}: {line.text}"
            for unit in (AGENT, UPDATER, SOCKET)
            for line in self.container.journal(unit)[-25:]
        ]
        return "\n".join(said)


def plays(seen: machine.Seen, role: str) -> bool:
    """Whether it is the process that plays the role, or is about to: `… instar.pyz [launch] ROLE --state DIR`."""
    words = [word for word in seen.words if word != "launch"]
    triples = zip(words, words[1:], words[2:], strict=False)
    found = any((a.endswith(".pyz"), b, c) == (True, role, "--state") for a, b, c in triples)
    return found and "--rehearse" not in seen.words


def outcomes(history: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return [(each["line"], each["version"], each["state"]) for each in history]
