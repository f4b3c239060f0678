"""Real nodes that reach their server, and not the port that it serves metadata and targets on (requirement M3)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from instar_lab import machine
from tests.e2e.conftest import NEW, OLD, SERVER_SETTINGS, Stage, health, settings, updates

# A port that nobody listens on, as behind a firewall that says no.
APART = 'artifacts_port = 0\npublic_artifacts = "https://127.0.0.1:1"\n'


@pytest.fixture
def cut_off(stage: Stage) -> Iterator[Stage]:
    """A stage whose server names a place for its artifacts that no node reaches."""
    server, config = stage.server, stage.server.layout.config
    before = config.read_text()
    assert SERVER_SETTINGS in before
    server.stop()
    config.write_text(before + APART)
    server.start()
    try:
        yield stage
    finally:
        server.stop()
        config.write_text(before)
        server.start()


def test_what_a_node_cannot_fetch_comes_through_the_channel(cut_off: Stage) -> None:
    """Also what it has on its disk already, of which only the signed metadata are missing."""
    node = cut_off.node(settings())
    cut_off.want(NEW)
    updates(node, NEW)
    sent = cut_off.server.transfer(node.id)
    assert (sent["state"], sent["cause"], sent["version"]) == ("received", "trouble", NEW)
    cut_off.connected(node)
    cut_off.want(OLD)
    updates(node, OLD, before=2)
    assert health(node)["version"] == OLD
    machine.wait_for(
        lambda: "artifacts-unreachable" in {entry["reason_code"] for entry in cut_off.server.history(node.id)},
        "its word in the history", 60.0, node.logs,
    )  # fmt: skip
