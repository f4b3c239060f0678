"""Runs the scenarios, records their points, and kills one fresh node at each.

Two kinds of recovery: 'kept' leaves the keeper alone, which starts again whatever died (one that was itself
killed is started by `instar start`, and adopts what lives on); 'started' kills
everything of the node at that moment and starts the node again, as a boot would; there a second kill
comes at a point of the recovery itself.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from instar.core.errors import InstarError, MachineError
from instar.engine.journal import Journals
from instar.host.clock import Clock
from instar.host.layout import LINES, Layout
from instar.host.line import Line
from instar.host.records import read_quarantine
from instar_lab import machine
from instar_lab.kills import killing
from instar_lab.kills.scenario import OLD, Point, Row, Scenario
from instar_lab.node import Node
from instar_lab.program import build, variants
from instar_lab.server import LabServer

AT_ONCE = 8
KILLED_S = 60.0  # until the planned kill has happened
SERVER_SETTINGS = "look_floor_s = 0.2\n"  # wishes follow each other quickly here
SETTLED_S = 180.0  # until the node has come to rest by itself


class Range:
    """A server with the releases of `scenarios`. Nodes are made below `folder`, one per run."""

    def __init__(self, folder: Path, scenarios: Sequence[Scenario] = ()) -> None:
        self.folder, self.scenarios = folder, scenarios
        self.server = LabServer(folder / "server")
        self.programs: dict[str, build.Program] = {}

    def open(self) -> None:
        self.server.create()
        with self.server.layout.config.open("a") as file:
            file.write(SERVER_SETTINGS)
        self.server.start()
        self.programs[OLD] = variants.variant("killed-at", OLD)
        for scenario in self.scenarios:
            self.programs[scenario.version] = variants.variant(scenario.variant, scenario.version)
        for program in self.programs.values():
            self.server.publish(program)
        for scenario in self.scenarios:
            self.server.want(scenario.version, scenario.lines, scenario.group)
            handed = self.folder / f"{scenario.name}.pyz"
            self.server.hand_out(self.programs[OLD], self.server.token(1000, scenario.group), handed)

    def close(self) -> None:
        self.server.close()
        machine.end_all_naming(self.folder, grace_s=1.0)

    # --- recording

    def points(self, scenario: Scenario) -> list[Point]:
        """Every arrival at a named point in one undisturbed run, in order, repeated waits left out."""
        node = self._node(scenario, f"r-{scenario.name}")
        record = self.folder / f"record-{scenario.name}"
        killing.plan(node, [], record)
        node.cli("start")
        fault = self._settle(node, scenario)
        node.end(1.0)
        if fault:
            raise MachineError("bad-recording", f"cannot record {scenario.name}: {fault}\n{node.logs()}")
        return killing.recorded(record)

    # --- killing

    def kill_all(self, runs: Iterable[tuple[Scenario, Point, Point | None]]) -> Iterator[Row]:
        """One fresh node for each run, a few at a time."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            jobs = [pool.submit(self._kill, number, *run) for number, run in enumerate(runs)]
            for job in jobs:
                yield job.result()

    def _kill(self, number: int, scenario: Scenario, point: Point, again: Point | None) -> Row:
        began = time.monotonic()
        node = self._node(scenario, f"k{number}")
        how, outcome, reached = "kept" if again is None else "started", "", True
        try:
            killing.plan(node, [point] if again is None else [point, again])
            killing.start(node)
            reached = self._killed(node, scenario, 1)
            if again is None and point.role == "keep":
                killing.start(node)  # nobody keeps the keeper; it adopts what lives on
            if again is not None and reached:
                killing.boot(node)
                self._killed(node, scenario, 2)
                killing.boot(node)
            fault = self._settle(node, scenario)
            outcome = self._outcome(node)
        except InstarError as error:
            fault = error.text
        finally:
            logs = node.logs()
            node.end(1.0)
        took = time.monotonic() - began
        return Row(
            scenario.name, point, again, how, outcome, took, f"{fault}\n{logs}" if fault else "", reached
        )

    def _node(self, scenario: Scenario, name: str) -> Node:
        node = Node(self.folder / name)
        node.install(self.folder / f"{scenario.name}.pyz", scenario.settings, start=False)
        return node

    def _killed(self, node: Node, scenario: Scenario, kills: int) -> bool:
        """Wait until that many planned kills have happened; False when the node came to its end without."""
        end = time.monotonic() + KILLED_S
        while time.monotonic() < end:
            if killing.happened(node) >= kills:
                return True
            if done(node.layout, scenario):
                return False
            machine.pause(0.02)
        return False

    def _settle(self, node: Node, scenario: Scenario) -> str:
        """Wait until the node rests; '' when it is as it must be, else what is wrong."""
        end = time.monotonic() + SETTLED_S
        while time.monotonic() < end:
            if done(node.layout, scenario) and not self._fault(node, scenario):
                machine.pause(0.3)  # a process that was seen may have been about to die of the kill
                if not self._fault(node, scenario):
                    return ""
            machine.pause(0.1)
        return self._fault(node, scenario) or "its transactions did not end"

    def _fault(self, node: Node, scenario: Scenario) -> str:
        running = Counter(seen.role for seen in node.running())
        for role in LINES:
            if running[role] != 1:
                return f"{running[role]} processes run as {role}"
        for seen in node.running():
            allowed = {self.programs[version].digest for version in scenario.ends[seen.role]}
            if seen.digest not in allowed:
                return f"{seen.role} runs {seen.digest[:12]}, which is none of {scenario.ends[seen.role]}"
            line = Line(node.layout.line(seen.role))
            if not line.is_valid(line.current()):
                return f"{seen.role}: the current release {line.current()!r} is not valid"
            if seen.program.parent.name != line.current():
                return f"{seen.role} runs {seen.program.parent.name}, current is {line.current()}"
        return ""

    def _outcome(self, node: Node) -> str:
        lines = {role: Line(node.layout.line(role)).current().rpartition("-")[0] for role in LINES}
        ends = [
            f"{j.progress.begin.line} {j.progress.state.value}"
            + (f" ({j.progress.reason.code})" if j.progress.reason else "")
            for j in Journals(node.layout.journal, Clock()).read_all()
        ]
        return f"agent {lines['agent']}, updater {lines['updater']}; {', '.join(ends)}"


def rests(layout: Layout) -> bool:
    """Whether no transaction is open."""
    journals = Journals(layout.journal, Clock()).read_all()
    return bool(journals) and all(j.progress.finished for j in journals)


def done(layout: Layout, scenario: Scenario) -> bool:
    """Whether every wish of the scenario is met, or its release is in quarantine here."""
    if not rests(layout):
        return False
    kept_out = {(name.partition(":")[0], e.version) for name, e in read_quarantine(layout.quarantine).items()}
    for role in scenario.lines:
        version = Line(layout.line(role)).current().rpartition("-")[0]
        if version != scenario.version and (role, scenario.version) not in kept_out:
            held = role == "agent" and ("updater", scenario.version) in kept_out
            if not held:
                return False
    return True
