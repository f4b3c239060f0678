"""Plays the demo's script with a real server and real nodes, and checks every step from outside."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from instar.core.errors import InstarError
from instar_lab import machine
from instar_lab.demo.checks import WrongEnd, check_processes
from instar_lab.demo.report import Report, StepReport
from instar_lab.demo.script import ACTS, GOOD, GROUP, STEPS, Act, Step
from instar_lab.demo.view import Row, View
from instar_lab.demo.work import Work
from instar_lab.fleet import Fleet
from instar_lab.node import Node
from instar_lab.program import build, variants
from instar_lab.server import NodeSeen

STEP_S = 150.0  # the longest that any step may take
SETTLED_S = 1.5  # how long a node must stay as it should be before it is believed

STEPS_IN_ALL = len(STEPS) + len(ACTS)

# So that seven releases fit into two minutes. Nothing else differs from a real node.
SETTINGS = """\
[trial]
hold_s = 2.0
lease_s = 20.0
cap_s = 60.0
attempts = 2

[rehearsal]
within_s = 15.0

[updater]
retry_floor_s = 0.3
retry_cap_s = 2.0
"""


@dataclass(frozen=True, slots=True)
class Glimpse:
    """One node as the server knows it: its state, and its history, oldest first."""

    seen: NodeSeen
    events: list[dict[str, Any]]

    def runs(self, program: build.Program) -> bool:
        """Whether it is connected and on `program` with both lines."""
        digests = (self.seen.agent, self.seen.updater)
        return self.seen.state == "connected" and digests == (program.digest, program.digest)

    def ended(self, step: Step, phase: str) -> set[str]:
        """The lines whose transactions to this step's release ended so; empty while one has not."""
        last = {e["tx"]: e for e in self.events if e["version"] == step.version and e["tx"]}
        if any(event["phase"] != phase for event in last.values()):
            return set()
        return {event["line"] for event in last.values()}


@dataclass(slots=True)
class Demo:
    """One run. `fleet` is started and ended by the caller. `began`: monotonic seconds, from where time is counted."""

    fleet: Fleet
    view: View
    began: float
    report: Report = field(default_factory=Report)
    programs: dict[str, build.Program] = field(default_factory=dict)

    def run(self) -> Report:
        """Play all steps. A step that ends wrong is reported, and the later ones are still played."""
        for step in STEPS:
            entry = self._entry(step.name, step.version, step.story)
            self._play(entry, f"{step.version} {step.name}", partial(self._step, step, entry))
            if entry.outcome == "wrong" and step.moves:
                break  # nothing after this can be right
        else:
            self._work()
        self.report.seconds = time.monotonic() - self.began
        self.report.ok = len(self.report.steps) == STEPS_IN_ALL and all(
            entry.outcome != "wrong" for entry in self.report.steps
        )
        return self.report

    def _work(self) -> None:
        """Play what is done with modules."""
        work = Work(self.fleet, self.programs[GOOD], self._wait_for_events)
        for act in ACTS:
            entry = self._entry(act.name, act.wanted, act.story)

            def play(act: Act = act, entry: StepReport = entry) -> str:
                entry.reason, entry.outcome = work.acts[act.name](), act.outcome
                return entry.reason

            self._play(entry, act.wanted, play)

    def _entry(self, name: str, wanted: str, story: str) -> StepReport:
        """The next step, announced."""
        entry = StepReport(name, wanted)
        self.report.steps.append(entry)
        self.view.headline(f"[{len(self.report.steps)}/{STEPS_IN_ALL}] {name}: {wanted} — {story}")
        return entry

    def _play(self, entry: StepReport, what: str, play: Callable[[], str]) -> None:
        """`play` returns what came of it in a line. Failing, the step is wrong, with the logs' ends to look at."""
        at = time.monotonic()
        try:
            came = play()
            self.view.say(f"  ✓ {what}: {came} ({time.monotonic() - at:.1f} s)", "green")
        except InstarError as error:
            entry.outcome, entry.reason = "wrong", one_line(error.text)
            self.view.say(f"  ✗ {what}: {error.text}", "bold red")
            self.view.say(self.fleet.logs(), "dim")
        entry.nodes = self._agents()

    # --- one step

    def _step(self, step: Step, entry: StepReport) -> str:
        program = self._build(step)
        archive = self.fleet.server.publish(program)
        if step.altered:
            self.fleet.server.alter(archive)
        self.fleet.server.want(step.version, step.lines, GROUP)
        if step is STEPS[0]:
            self.fleet.add_nodes(program, SETTINGS)
            self._wait_all(lambda glimpse: glimpse.runs(program), f"every node on {step.version}")
            entry.outcome, entry.reason = "installed", "enrolled with a token"
        elif step.moves:
            self._wait_all(
                lambda glimpse: glimpse.runs(program) and glimpse.ended(step, "confirmed") == set(step.lines),
                f"every node on {step.version}",
            )
            entry.outcome, entry.reason = "updated", "rehearsed, on trial, confirmed"
        else:
            self._wait_all(
                lambda glimpse: bool(glimpse.ended(step, "reverted")), f"every node to give {step.version} up"
            )
            entry.reason = self._why(step)
            entry.outcome = "reverted" if self._was_on_trial(step) else "refused"
        self._check(step, entry)
        return self._sum_up(entry)

    def _build(self, step: Step) -> build.Program:
        made = variants.variant(step.variant, step.version) if step.variant else build.build(step.version)
        self.programs[step.version] = made
        return made

    def _wait_all(self, arrived: Callable[[Glimpse], bool], what: str) -> None:
        """Wait until every node has arrived and has stayed so for SETTLED_S; draws the table meanwhile."""
        since: list[float] = []

        def look() -> bool:
            self.fleet.check_server()
            glimpses = self._glimpses()
            self.view.show([self._row(glimpse) for glimpse in glimpses])
            if len(glimpses) < len(self.fleet.nodes) or not all(map(arrived, glimpses)):
                since.clear()
                return False
            since.append(time.monotonic())
            return since[-1] - since[0] >= SETTLED_S

        machine.wait_for(look, what, STEP_S, self._what_is_there, every_s=0.2)

    def _wait_for_events(self, arrived: Callable[[list[dict[str, Any]]], bool], what: str) -> None:
        """The same by the nodes' histories alone."""
        self._wait_all(lambda glimpse: arrived(glimpse.events), what)

    def _glimpses(self) -> list[Glimpse]:
        """What the server knows now of each node that has enrolled."""
        seen = self.fleet.seen()
        ids = [node.id for node in self.fleet.nodes]
        return [Glimpse(seen[id_], self.fleet.server.history(id_)) for id_ in ids if id_ in seen]

    # --- what is checked

    def _check(self, step: Step, entry: StepReport) -> None:
        """By /proc, by the server, and by each node's own history. Raises WrongEnd."""
        expected = self.programs[step.version if step.moves else GOOD]
        for node in self.fleet.nodes:
            check_processes(node, expected)
            self._check_history(node, step)
        for glimpse in self._glimpses():
            if not glimpse.runs(expected):
                text = f"expected {expected.version} on both lines, the server sees {glimpse.seen}"
                raise WrongEnd("wrong-release", text)
        if not step.moves and (entry.outcome == "reverted") != step.trial:
            raise WrongEnd(
                "wrong-outcome", f"{step.version} was {entry.outcome}, which is not how it must fail"
            )

    def _check_history(self, node: Node, step: Step) -> None:
        if step is STEPS[0]:
            return
        wanted = "confirmed" if step.moves else "reverted"
        told = [change for change in node.history() if change["version"] == step.version]
        ends = [change for change in told if change["state"] == wanted]
        if not ends or len(ends) != len(told):
            states = ", ".join(change["state"] for change in told) or "nothing"
            raise WrongEnd("wrong-history", f"{node.id}: expected '{wanted}' of {step.version}, got {states}")
        if not step.moves and not all(change["reason"] and change["reason"]["text"] for change in ends):
            raise WrongEnd(
                "no-reason", f"{node.id}: its history does not say why {step.version} was given up"
            )

    def _why(self, step: Step) -> str:
        """The reason that most nodes give in their own history, in one line."""
        found = Counter(
            one_line(change["reason"]["text"])
            for node in self.fleet.nodes
            for change in node.history()
            if change["version"] == step.version and change["reason"]
        )
        return found.most_common(1)[0][0] if found else ""

    def _was_on_trial(self, step: Step) -> bool:
        return any(
            event["version"] == step.version and event["phase"] == "trial"
            for node in self.fleet.nodes
            for event in self.fleet.server.history(node.id)
        )

    def _agents(self) -> dict[str, str]:
        """Node id -> the digest that its agent runs, '' where none does."""
        found: dict[str, str] = {}
        for node in self.fleet.nodes:
            found[node.id] = next((r.digest for r in node.running() if r.role == "agent"), "")
        return found

    # --- what is shown

    def _row(self, glimpse: Glimpse) -> Row:
        seen, events = glimpse.seen, glimpse.events
        agent, updater = (self._name(digest) for digest in (seen.agent, seen.updater))
        return Row(seen.id, seen.state, agent, updater, describe(events[-1]) if events else "")

    def _name(self, digest: str) -> str:
        for version, program in self.programs.items():
            if program.digest == digest:
                return f"{version} {digest[:8]}"
        return digest[:8]

    def _sum_up(self, entry: StepReport) -> str:
        count = len(self.fleet.nodes)
        if entry.outcome in ("installed", "updated"):
            return f"{count} nodes {entry.outcome}"
        return f"{entry.outcome} by {count} nodes, all on {GOOD}: {entry.reason}"

    def _what_is_there(self) -> str:
        rows = map(self._row, self._glimpses())
        return "; ".join(f"{r.node} {r.state} agent {r.agent} updater {r.updater}: {r.doing}" for r in rows)


def describe(event: dict[str, Any]) -> str:
    """One history event in one line."""
    reason = one_line(event["reason_text"])
    what = " ".join(part for part in (event["line"], event["version"], event["phase"]) if part)
    return f"{what}: {reason}" if reason else what


def one_line(text: str) -> str:
    return " ".join(text.split())


def run(fleet: Fleet, view: View, report_path: Path | None, began: float) -> Report:
    """Play the demo; the report is written whatever comes of it."""
    demo = Demo(fleet, view, began)
    try:
        return demo.run()
    finally:
        if report_path is not None:
            demo.report.write(report_path)
