"""What must hold in the demo, of nodes looked at from outside and of what orders have come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from instar.core.errors import MachineError
from instar.host.layout import LINES
from instar_lab.node import Node
from instar_lab.program import build


class WrongEnd(MachineError):
    """A node is not where the script says that it must be."""


def check_processes(node: Node, expected: build.Program) -> None:
    """Exactly one process for each role, each running the expected bytes from its own line's folder."""
    running = {item.role: item for item in node.running()}
    if len(node.running()) != len(LINES) or set(running) != set(LINES):
        roles = ", ".join(f"{item.role} ({item.pid})" for item in node.running()) or "none"
        raise WrongEnd("wrong-processes", f"{node.id}: expected one agent and one updater, got {roles}")
    for role, item in running.items():
        folder = node.layout.line(role).releases / expected.release
        if item.digest != expected.digest or item.program.parent.resolve() != folder.resolve():
            text = f"{node.id}: expected its {role} to run {folder.name}, got {item.program}"
            raise WrongEnd("wrong-release", text)


def check_done(order: dict[str, Any], nodes: int) -> None:
    """Every one of so many nodes did what was ordered."""
    rows = order["rows"]
    if len(rows) != nodes or any(row["state"] != "done" for row in rows):
        told = "; ".join(f"{row['node']} {row['state']} {row['code']}: {row['text']}" for row in rows)
        raise WrongEnd(
            "job-not-done", f"expected {order['name']} done by {nodes} nodes, got {told or 'none'}"
        )


def check_same_state(before: dict[str, Any], now: dict[str, Any]) -> None:
    """What file.integrity told before in its answers, it tells still: its numbered changes outlive it."""
    after = {row["node"]: row["reply"]["changes"] for row in now["rows"]}
    for row in before["rows"]:
        told = row["reply"]["changes"]
        if not told or after[row["node"]][: len(told)] != told:
            raise WrongEnd("state-lost", f"{row['node']}: expected {told}, got {after[row['node']]}")


def check_other_processes(before: Mapping[str, int | None], now: Mapping[str, int | None], what: str) -> None:
    """On every node there is a process, and another one than before."""
    for node, pid in now.items():
        if pid is None or pid == before[node]:
            raise WrongEnd("not-restarted", f"{node}: expected another process of {what}, got {pid}")
