"""A node that goes through many rows, and what must be true of it whenever it rests."""

from __future__ import annotations

import signal
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from instar.agent.runners import SPARES
from instar.core.errors import InstarError
from instar.core.journal import Progress
from instar.engine.journal import Journal, Journals
from instar.host import processes
from instar.host.clock import Clock
from instar.host.layout import LINES, Layout
from instar.host.line import Line
from instar.host.services import spawn_keeper
from instar.host.sockets import ask
from instar_lab import machine
from instar_lab.kills.modules import MEMORY
from instar_lab.node import Node
from instar_server.ctl.client import Client

# Short, but the order of everything is that of a real node. One fall in a trial is enough: no sound module
# of ours ever falls by itself.
SETTINGS = """\
[trial]
hold_s = 0.3
lease_s = 20.0
cap_s = 40.0
attempts = 1

[rehearsal]
within_s = 30.0

[updater]
retry_floor_s = 0.1
retry_cap_s = 0.5
poll_s = 2.0
"""
LINE = f"module/{MEMORY}"
ANSWER_S = 5.0
RESTED_S = 120.0
STAYS = {"keep", *LINES, "runner"}  # what runs while a node rests
FINAL = ("done", "failed", "cancelled", "lapsed", "lost")


class Ward:
    """`client` is this one's own. Not safe for use by several threads."""

    def __init__(self, node: Node, client: Client) -> None:
        self.node, self.client = node, client
        self.layout: Layout = node.layout
        self.memory = Line(self.layout.module(MEMORY))
        self.sum = 0  # what the service module must remember
        self.marks = node.state.parent / f"{node.name}.marks"
        self._n = 0

    def open(self, program: Path) -> None:
        """Install it, and wait until it rests."""
        self.node.install(program, SETTINGS)
        self.rest()

    def close(self) -> None:
        self.client.__exit__()
        self.node.end(1.0)

    def number(self) -> int:
        """One that no row of this node had before."""
        self._n += 1
        return self._n

    def keep_anew(self) -> None:
        """Put a new keeper in the old one's place: that one would wait longer each time before it starts
        what was killed, and the rows are no crash loop."""
        keeper = processes.recorded(self.layout.process("keep"))
        if keeper is not None:
            processes.send(keeper, Clock().boot_id(), signal.SIGKILL)
            machine.wait_gone(keeper.pid, ANSWER_S)
        spawn_keeper(self.layout)

    # --- asking

    def said(self, role: str, do: str, **more: Any) -> dict[str, Any]:
        """Raises InstarError while it does not answer."""
        return ask(self.layout.socket(role), {"do": do, **more}, ANSWER_S)

    def modules(self) -> dict[str, dict[str, Any]]:
        return {each["name"]: each for each in self.said("agent", "modules")["modules"]}

    def want(self, version: str) -> None:
        """Want the service module in this version, '' for not at all."""
        scope = {"scope": "node", "subject": self.node.id}
        if version:
            self.client.put("/wishes", {**scope, "lines": [LINE], "version": version})
        else:
            self.client.delete("/wishes", **scope, line=[LINE])

    def order(self, path: str, **body: Any) -> str:
        """Order something of this node; the order's id."""
        return str(self.client.post(path, {"select": {"nodes": [self.node.id]}, **body})["id"])

    def row(self, order: str) -> dict[str, Any]:
        """The order's one row."""
        (row,) = self.client.get(f"/jobs/{order}")["rows"]
        return dict(row)

    def ended(self, order: str, within_s: float = RESTED_S) -> dict[str, Any]:
        """Wait for the order's row to end."""

        def final() -> dict[str, Any] | None:
            row = self.row(order)
            return row if row["state"] in FINAL else None

        return machine.wait_for(final, f"the end of {order}", within_s, lambda: str(self.row(order)), 0.02)

    def told(self, id_: str) -> int:
        """How often the server's history of this node has the end of a restart."""
        entries = self.client.get(f"/nodes/{self.node.id}/history", limit=1000)["entries"]
        return sum(entry["id"] == f"restart-ended:{id_}" for entry in entries)

    # --- what must be true

    def rest(self) -> None:
        """Wait until nothing is wrong. Raises MachineError."""
        machine.wait_for(
            lambda: not self.fault(), f"{self.node.name} at rest", RESTED_S,
            lambda: f"{self.fault()}\n{self.node.logs(30)}", 0.03,
        )  # fmt: skip

    def fault(self) -> str:
        """What is not as it must be of a node that rests; '' for nothing."""
        try:
            return self._programs() or self._runners() or self._line() or self._held()
        except InstarError as error:
            return error.text

    def _programs(self) -> str:
        running = self.node.running()
        counts = Counter(seen.role for seen in running)
        for role in LINES:
            if counts[role] != 1:
                return f"{counts[role]} processes run as {role}"
        for seen in running:
            line = Line(self.layout.line(seen.role))
            if seen.program.parent.name != line.current() or not line.is_valid(line.current()):
                return f"{seen.role} runs {seen.program.parent.name}, current is {line.current()}"
        others = [seen.words for seen in machine.naming(self.node.state) if not STAYS & set(seen.words)]
        return f"other processes run: {others}" if others else ""

    def _runners(self) -> str:
        """Whose child is each runner? One of a dead agent, or of no service, must not be there."""
        said = self.said("agent", "health")
        agent, services = said["pid"], {pid for pid in said["pids"].values() if pid}
        found = {seen.pid: seen.words for seen in machine.naming(self.node.state) if "runner" in seen.words}
        warm = {pid for pid, words in found.items() if words[-1] == "--warm" and machine.parent(pid) == agent}
        spare = {pid for pid in found if machine.parent(pid) in warm}
        left = set(found) - services - warm - spare
        if left:
            return (
                f"runners are left over: {[(pid, machine.parent(pid), found[pid]) for pid in sorted(left)]}"
            )
        if len(warm) > 1 or len(spare) > SPARES:
            return f"{len(warm)} fork servers with {len(spare)} spares run"
        if services - set(found):
            return f"the agent speaks of processes that are not there: {services - set(found)}"
        strays = [pid for pid in services if machine.parent(pid) != agent]
        return f"services that are no children of the agent run: {strays}" if strays else ""

    def _line(self) -> str:
        """The service module: exactly what the journal explains, and well."""
        current, rows = self.memory.current(), self.modules()
        journal = self.journal()
        if open_ := [f"{p.begin.version} is {p.state.value}" for p in journal if not p.finished]:
            return f"transactions are open: {open_}"
        if current != self.explained():
            return f"current is {current or 'nothing'}, the journal says {self.explained() or 'nothing'}"
        row = rows.get(MEMORY)
        if not current or row is None:
            return f"current is {current or 'nothing'}, the agent runs {row}" if current or row else ""
        if not self.memory.is_valid(current):
            return f"the current release {current} is not valid"
        name = f"{row['version']}-{row['digest'][:12]}"
        if name != current or row["state"] != "ok":
            return f"current is {current}, the agent has {name}, {row['state']}: {row['error']}"
        process = processes.recorded(self.layout.module(MEMORY).process)
        if process is None or (process.pid, process.release) != (row["pid"], current):
            return f"process {row['pid']} runs {current}, its record says {process}"
        return "a trial is left over" if self.memory.layout.trial.exists() else ""

    def _held(self) -> str:
        """Nothing that has ended is kept back: the server has acknowledged all of it."""
        said = self.said("agent", "status")
        if not said["connected"]:
            return "the agent is not connected"
        if said["jobs_held"]:
            return f"{said['jobs_held']} jobs are held"
        open_ = sorted(path.name for path in self.layout.commands.glob("*.json"))
        return f"commands are held: {open_}" if open_ else ""

    # --- the journal

    def journal(self) -> list[Progress]:
        """The service module's transactions, oldest first."""
        return [journal.progress for journal in self._journals()]

    def overlap(self) -> str:
        """Two transactions that were open at the same time; '' for none."""
        found = self._journals()
        for one, other in pairwise(found):
            if other.progress.began.wall < one.records[-1].at.wall:
                return f"{one.progress.begin.tx} and {other.progress.begin.tx} were open at the same time"
        return ""

    def _journals(self) -> list[Journal]:
        found = [
            j for j in Journals(self.layout.journal, Clock()).read_all() if j.progress.begin.line == LINE
        ]
        return sorted(found, key=lambda journal: journal.progress.began.wall)

    def explained(self) -> str:
        """The release that must run by what is on record, '' for none."""
        record = self.layout.module(MEMORY).retired
        journal = self.journal()
        if not journal or record.exists():
            return ""
        last = journal[-1]
        return last.begin.release.name if last.state.value == "confirmed" else last.begin.origin

    # --- the state

    def remembers(self) -> str:
        """Ask the service module to add one to its sum; '' when the sum is what it must be."""
        order = self.order("/jobs", module=MEMORY, args={"add": 1}, wait_s=ANSWER_S)
        row = self.ended(order)
        want = self.sum + 1
        if row["ok"] is not True:
            return f"the module does not answer: {row['code']}: {row['text']}"
        if row["reply"]["sum"] != want:
            return f"the module's sum is {row['reply']['sum']}, not {want}"
        self.sum = want
        return ""
