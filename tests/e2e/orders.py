"""Jobs and restarts as an operator orders them, and modules as a node has them, for the tests here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from instar.core.errors import InstarError
from instar_lab import machine
from instar_lab.node import Node
from instar_lab.server import LabServer
from tests.e2e.conftest import said

MODULES = Path(__file__).parent / "modules"
TOML = """\
name = "{name}"
version = "1.0.0"
runs = "python"
mode = "oneshot"
entry = {{ any = "module.py" }}

[limits]
memory = 134217728
processes = 16
"""
FINAL = ("done", "failed", "cancelled", "lapsed", "lost")


def variant(folder: Path, name: str, version: str, changes: dict[str, str]) -> Path:
    """The module `name` of the tests in another version, with words of its source exchanged."""
    copy = folder / f"{name}-{version}"
    shutil.copytree(MODULES / name, copy)
    for path in copy.iterdir():
        text = path.read_text().replace('version = "1.0.0"', f'version = "{version}"')
        for old, new in changes.items():
            text = text.replace(old, new)
        path.write_text(text)
    return copy


def job(server: LabServer, module: str, node: Node, wait_s: float = 90.0, **more: Any) -> dict[str, Any]:
    """Order a job on one node. The order, when its row has ended; with a `wait_s` of 0 at once."""
    body = {"module": module, "select": {"nodes": [node.id]}, **more}
    order = dict(server.api.post("/jobs", body))
    if wait_s:
        ended(server, order["id"], wait_s)
        order = shown(server, order["id"])
    return order


def row(order: dict[str, Any]) -> dict[str, Any]:
    (only,) = order["rows"]
    return dict(only)


def shown(server: LabServer, order: str) -> dict[str, Any]:
    return dict(server.api.get(f"/jobs/{order}"))


def ended(server: LabServer, order: str, within_s: float = 90.0) -> dict[str, Any]:
    """Wait for the order's one row to end."""

    def final() -> dict[str, Any] | None:
        found = row(shown(server, order))
        return found if found["state"] in FINAL else None

    return machine.wait_for(final, f"the end of {order}", within_s, lambda: str(shown(server, order)))


def restart(server: LabServer, node: Node, wait_s: float = 150.0, **more: Any) -> dict[str, Any]:
    """Order a restart of a node's modules or agent. Its row, when it has ended."""
    body = {"select": {"nodes": [node.id]}, "wait_s": 0.0, "within_s": 120.0, **more}
    order = server.api.post("/restarts", body)
    return ended(server, order["id"], wait_s)


def want_module(server: LabServer, group: str, name: str, version: str) -> None:
    line = f"module/{name}"
    server.api.put("/wishes", {"scope": "group", "subject": group, "lines": [line], "version": version})


def modules(node: Node) -> dict[str, dict[str, Any]]:
    """The service modules as the agent describes them; {} while it does not answer."""
    try:
        return {each["name"]: each for each in said(node, "agent", "modules")["modules"]}
    except InstarError:
        return {}


def runs(node: Node, name: str, version: str, within_s: float = 90.0) -> dict[str, Any]:
    """Wait until a service module runs in this version, and is well."""

    def well() -> dict[str, Any] | None:
        found = modules(node).get(name, {})
        return found if (found.get("version"), found.get("state")) == (version, "ok") else None

    def instead() -> str:
        return f"{modules(node)}\n{node.cli('history')}\n{node.logs(30)}"

    return machine.wait_for(well, f"{name} {version}", within_s, instead)


def source(folder: Path, name: str, body: str) -> Path:
    """A one-shot Python module of this text."""
    made = folder / name
    made.mkdir()
    (made / "module.py").write_text(body)
    (made / "module.toml").write_text(TOML.format(name=name))
    return made
