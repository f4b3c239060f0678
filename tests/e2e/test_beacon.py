"""A real node of which nothing is left, and a real server: it comes back without anybody's help (M5)."""

from __future__ import annotations

import contextlib
import shutil
import time

import pytest

from instar.core.errors import MachineError
from instar_lab import machine
from instar_lab.node import Node
from instar_lab.program import recovery
from tests.e2e.conftest import NEW, OLD, Hall, Stage, settled, updates

CORE = "0.0.7"


@pytest.fixture(scope="module")
def with_core(hall: Hall) -> str:
    """The hall has a recovery core from now on; its version."""
    hall.server.publish_recovery(recovery.build_core(CORE))
    return CORE


def harm(node: Node, how: str) -> None:
    """All releases of both lines, while nothing runs."""
    for role in ("agent", "updater"):
        line = node.layout.line(role)
        if how == "deleted":
            shutil.rmtree(line.folder)
            continue
        for path in line.releases.rglob("*"):
            if path.is_file():
                size = path.stat().st_size
                path.chmod(0o600)
                path.write_bytes(bytes(size))


def both_run(node: Node, digest: str) -> bool:
    """One that is about to exec a child looks like two for a moment."""
    with contextlib.suppress(MachineError):
        return node.digests() == {"agent": digest, "updater": digest}
    return False


@pytest.mark.parametrize("how", ["zeros", "deleted"])
def test_a_node_of_which_nothing_is_left(stage: Stage, hall: Hall, with_core: str, how: str) -> None:
    node = stage.node()
    stage.want(NEW)
    updates(node, NEW)
    node.cli("stop")
    harm(node, how)
    with contextlib.suppress(MachineError):  # it gives up waiting for roles that nobody can play yet
        node.cli("start")
    digest = hall.programs[NEW].digest
    machine.wait_for(lambda: both_run(node, digest), "both programs", 120.0, node.logs)
    found = settled(node, 4, within_s=120.0)
    assert [(e["line"], e["version"], e["state"]) for e in found[2:]] == [
        ("agent", NEW, "confirmed"), ("updater", NEW, "confirmed"),
    ]  # fmt: skip
    machine.wait_for(
        lambda: "recovery-ended" in [each["phase"] for each in hall.server.history(node.id)],
        "the recovery's end at the server", 60.0, node.logs,
    )  # fmt: skip


def test_a_wish_by_the_way_of_recovery(stage: Stage, hall: Hall, with_core: str) -> None:
    """A healthy node, recovered on an operator's word: the trial and the way back hold as always."""
    node = stage.node()
    assert node.digests() == dict.fromkeys(("agent", "updater"), hall.programs[OLD].digest)
    hall.server.api.post(f"/nodes/{node.id}/recover", {"version": NEW, "lines": ["agent", "updater"]})
    digest = hall.programs[NEW].digest
    machine.wait_for(lambda: both_run(node, digest), "both programs", 120.0, node.logs)
    found = settled(node, 2, within_s=120.0)
    assert {(e["line"], e["state"]) for e in found} == {("agent", "confirmed"), ("updater", "confirmed")}


def test_stop_ends_a_recovery_core_too(stage: Stage, hall: Hall, with_core: str) -> None:
    """It would start both roles again, and somebody wants them stopped. What it had begun comes to an end later."""
    node = stage.node()
    hall.server.recover(node.id, NEW)
    at_work = ("downloaded", "take-over", "agent:staged", "agent:verified")
    machine.wait_for(
        lambda: hall.server.transfer(node.id)["phase"] in at_work, "a core", 60.0, node.logs, every_s=0.01
    )
    assert "running: nothing" in node.cli("stop")
    time.sleep(3.0)
    assert machine.naming(node.state) == []
    node.cli("start")
    stage.connected(node)
    settled(node, 0, within_s=120.0)
    # Once the core has taken over, no agent is there that could tell of its end: it is started again, and done.
    machine.wait_for(
        lambda: (end := hall.server.transfer(node.id))["code"] == "interrupted" or end["state"] == "done",
        "its end at the server", 120.0, node.logs,
    )  # fmt: skip
    hall.server.recover(node.id, NEW)
    digest = hall.programs[NEW].digest
    machine.wait_for(lambda: both_run(node, digest), "both programs", 120.0, node.logs)
