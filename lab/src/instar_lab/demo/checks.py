"""What must hold of a node in the demo, looked at from outside."""

from __future__ import annotations

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
