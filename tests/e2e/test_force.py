"""Real nodes whose mode of native updates is 'force', or 'never' (requirement M4)."""

from __future__ import annotations

import time
from typing import Any

from instar.engine.journal import Journals
from instar.host.clock import Clock
from instar_lab import machine
from instar_lab.node import Node
from tests.e2e.conftest import LINES, NEW, OLD, Stage, health, settings, settled

FORCE, NEVER = (settings(more=f'\n[native]\nmode = "{mode}"\n') for mode in ("force", "never"))
QUIET_S = 8.0  # longer than the server's round


def want(stage: Stage, version: str) -> None:
    stage.server.want(version, LINES, stage.group, "native")


def pids(node: Node) -> dict[str, int | None]:
    return {role: node.pid(role) for role in LINES}


def transfer(stage: Stage, node: Node, *states: str) -> dict[str, Any]:
    def found() -> dict[str, Any] | None:
        view = stage.server.transfer(node.id)
        return view if view["state"] in states else None

    return machine.wait_for(found, f"a transfer that is {states}", 60.0, lambda: node.logs(30))


def forced(node: Node, before: int, version: str) -> None:
    """Both lines were put there anew, from what came through the channel."""
    found = settled(node, before + len(LINES))
    assert [(e["line"], e["version"], e["state"]) for e in found[before:]] == [
        (line, version, "confirmed") for line in LINES
    ], node.cli("history") + node.logs(30)
    begins = [j.progress.begin for j in Journals(node.layout.journal, Clock()).read_all()[before:]]
    assert all(begin.forced for begin in begins), begins


def test_a_forced_node_takes_what_it_has_once_for_each_wish(stage: Stage) -> None:
    node = stage.node(FORCE)
    first = pids(node)
    want(stage, OLD)
    forced(node, 0, OLD)
    stage.connected(node)
    second = pids(node)
    assert second["agent"] not in (None, first["agent"])  # the updater's keeps its pid, and becomes another
    assert set(node.digests().values()) == {stage.hall.programs[OLD].digest}
    assert transfer(stage, node, "received")["cause"] == "force"
    node.cli("stop")
    node.cli("start")
    stage.connected(node)
    time.sleep(QUIET_S)  # what both lines were sent is offered again after a minute: it costs a question
    assert len(node.history()) == 2, node.cli("history")
    third = pids(node)
    want(stage, OLD)
    forced(node, 2, OLD)
    stage.connected(node)
    assert pids(node)["agent"] != third["agent"]


def test_a_node_that_takes_none_says_so_and_is_left_alone(stage: Stage) -> None:
    node = stage.node(NEVER)
    first = pids(node)
    want(stage, OLD)
    time.sleep(QUIET_S)
    want(stage, NEW)
    assert transfer(stage, node, "declined")["code"] == "never"
    time.sleep(QUIET_S)
    assert (node.history(), pids(node)) == ([], first)
    assert health(node)["version"] == OLD
    assert list(node.layout.incoming.glob("*")) == []
