"""A plan of kills beside a node, and the ways in which the node is started again."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from pathlib import Path

from instar.core.errors import MachineError
from instar_lab import machine
from instar_lab.kills.scenario import Point
from instar_lab.node import Node
from instar_lab.program.wrappers.killed_at import FILE


def plan(node: Node, kills: list[Point], record: Path | None = None) -> None:
    """Arm these kills, one after the other; what was planned and counted before is forgotten.

    A node may run meanwhile: it sees a whole plan, or none.
    """
    forget(node)
    wanted: dict[str, object] = {
        "kills": [{"role": k.role, "point": k.name, "count": k.count} for k in kills],
    }
    if record is not None:
        wanted["record"] = str(record)
    made = node.state / f"{FILE}.new"
    made.write_text(json.dumps(wanted))
    os.replace(made, node.state / FILE)


def forget(node: Node) -> None:
    """No kill is planned any more."""
    (node.state / FILE).unlink(missing_ok=True)
    for counted in node.state.glob(f"{FILE}.*"):
        counted.unlink()


def happened(node: Node) -> int:
    """How many of the planned kills have happened."""
    marks = node.state / f"{FILE}.done"
    return marks.stat().st_size if marks.exists() else 0


def recorded(record: Path) -> list[Point]:
    """Every arrival at a named point, in order."""
    counts: Counter[tuple[str, str]] = Counter()
    found = []
    for line in record.read_text().splitlines() if record.exists() else []:
        role, _, name = line.partition(" ")
        counts[role, name] += 1
        found.append(Point(role, name, counts[role, name]))
    return found


def start(node: Node) -> None:
    """As `instar start`; whether the daemons stay up is another question here."""
    with contextlib.suppress(MachineError):
        node.cli("start")


def boot(node: Node) -> None:
    """Everything of the node ends at once, and it is started as after a boot."""
    machine.end_all_naming(node.state, grace_s=0.0)
    start(node)
