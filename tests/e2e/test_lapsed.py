"""A node that was off for so long that its certificate has run out."""

from __future__ import annotations

import sqlite3
import time

from cryptography import x509

from instar_lab.node import Node
from instar_server.ca import FleetCA
from tests.e2e.conftest import NEW, Stage, settled

DAY_S = 86_400.0


def lapse(stage: Stage, node: Node) -> str:
    """Give the node, instead of its certificate, one that the server issued 40 days ago for 30: its serial."""
    held = x509.load_pem_x509_certificate(node.layout.certificate.read_bytes())
    begin, server = time.time() - 40 * DAY_S, stage.server.layout
    issued = FleetCA.load(server.ca).issue_node(node.id, held.public_key(), begin, 30 * DAY_S)  # type: ignore[arg-type]
    with sqlite3.connect(server.database, timeout=10) as database:
        row = (issued.serial, node.id, begin, issued.not_after)
        database.execute(
            "INSERT INTO certificates (serial, node, issued, not_after) VALUES (?, ?, ?, ?)", row
        )
    node.layout.certificate.write_text(issued.pem)
    return issued.serial


def test_it_comes_back_by_itself_and_is_updated(stage: Stage) -> None:
    node = stage.node()
    node.cli("stop")
    lapse(stage, node)
    node.cli("start")
    stage.connected(node)
    held = x509.load_pem_x509_certificate(node.layout.certificate.read_bytes())
    assert held.not_valid_after_utc.timestamp() > time.time()
    stage.want(NEW)
    assert [entry["state"] for entry in settled(node, 2)] == ["confirmed"] * 2
