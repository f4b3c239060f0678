"""Figures of real nodes: how long an update takes, how long the agent is away, what idle processes hold."""

from __future__ import annotations

import time

from bench.figures import Figure
from instar_lab import machine
from instar_lab.fleet import Fleet
from instar_lab.listening import Listener
from instar_lab.node import Node
from instar_lab.program import build

HOLD_S = 1.0
SETTINGS = f"[trial]\nhold_s = {HOLD_S}\n"
UPDATE_S = 60.0
IDLE_S = 30.0
MIB = 2**20


def measure(updates: int, idle_s: float = IDLE_S) -> list[Figure]:
    """One server and one node; `updates` updates of the agent line, then one of the updater line, then rest."""
    with Fleet(1) as fleet:
        first = build.build("1.0.0")
        fleet.server.publish(first)
        fleet.server.want("1.0.0", ("agent", "updater"), "default")
        fleet.add_nodes(first, SETTINGS)
        node = fleet.nodes[0]
        running = first
        wait_on(fleet, node, "agent", running)
        gaps, wholes = [], []
        for number in range(1, updates + 1):
            target = build.build(f"1.0.{number}")
            gap, whole = update(fleet, node, running, target)
            gaps.append(gap)
            wholes.append(whole)
            running = target
        updater = whole_update(fleet, node, "updater", running)
        machine.pause(idle_s)
        return [
            Figure("update gap", "ms", tuple(gap * 1000 for gap in gaps), 200.0, {"MeshAgent": 222.0}),
            Figure(
                "whole update",
                "s",
                tuple(wholes),
                1.5,
                {"MeshAgent": 0.386},
                "theirs has no signature, self-test, fsync or way back",
            ),
            Figure("whole update of the updater", "s", (updater,)),
            Figure(
                "idle agent",
                "MiB RSS",
                (memory(node, "agent"),),
                25.0,
                {"MeshAgent (C)": 11.5, "supervisord": 24.7, "mender": 35.3, "Salt minion": 116.0},
            ),
            Figure("idle updater, by hand", "MiB RSS", (memory(node, "updater"),), note="none under systemd"),
            Figure("keeper, by hand", "MiB RSS", (keeper_memory(node),)),
        ]


def update(fleet: Fleet, node: Node, old: build.Program, new: build.Program) -> tuple[float, float]:
    """Update the agent; (seconds that it was away, seconds from wanted to confirmed without the hold time)."""
    fleet.server.publish(new)
    with Listener(node.layout.socket("agent")) as listener:
        machine.wait_for(lambda: old.digest in listener.last, "the old agent to answer", 10.0)
        whole = whole_update(fleet, node, "agent", new)
    seen = fleet.seen()[node.id]
    return seen.connected_since - listener.last[old.digest], whole


def whole_update(fleet: Fleet, node: Node, line: str, new: build.Program) -> float:
    """Seconds from the answer to `want` to the journal's `confirmed`, less the hold time."""
    fleet.server.want(new.version, (line,), "default")
    wanted_at = time.time()

    def confirmed_at() -> float | None:
        events = fleet.server.history(node.id)
        ends = [e for e in events if (e["line"], e["digest"], e["phase"]) == (line, new.digest, "confirmed")]
        return float(ends[-1]["wall"]) if ends else None

    at = machine.wait_for(confirmed_at, f"{line} {new.version} confirmed", UPDATE_S, fleet.logs)
    return at - wanted_at - HOLD_S


def wait_on(fleet: Fleet, node: Node, line: str, program: build.Program) -> None:
    machine.wait_for(
        lambda: node.id in fleet.seen() and fleet.seen()[node.id].agent == program.digest,
        f"{line} {program.version} connected",
        UPDATE_S,
        fleet.logs,
    )


def memory(node: Node, role: str) -> float:
    """RSS in MiB."""
    pid = node.pid(role)
    assert pid is not None, f"{role} does not run"
    return machine.rss(pid) / MIB


def keeper_memory(node: Node) -> float:
    for seen in machine.naming(node.state):
        if "keep" in seen.words:
            return machine.rss(seen.pid) / MIB
    return 0.0
