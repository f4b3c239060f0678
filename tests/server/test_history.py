"""Events: stored once, chained, told apart; and what tampering does."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instar_server.storage.events import KEEP, SLACK
from tests.server.world import Node, World, running


def event(tx: str, n: int, phase: str, **more: Any) -> dict[str, Any]:
    base = {
        "id": f"{tx}:{n}", "tx": tx, "line": "agent", "phase": phase, "version": "1.1.0", "digest": "a" * 96,
        "from_version": "1.0.0", "reason": {"code": "c", "text": "why"}, "wall": time.time(), "boot_id": "b",
    }  # fmt: skip
    return {**base, **more}


def send(node: Node, *events: dict[str, Any]) -> Any:
    with node.http() as http:
        return http.post("/v1/node/events", json={"v": 1, "events": list(events)})


def history(world: World, node: Node) -> Any:
    with world.api() as api:
        return api.get(f"/nodes/{node.id}/history").json()


def test_events_are_stored_once_and_in_order(world: World) -> None:
    node = world.new_node()
    first, second = event("t1", 1, "offered"), event("t1", 2, "staged")
    assert send(node, first).json() == {"v": 1, "stored": ["t1:1"]}
    assert send(node, first, second, second).json()["stored"] == ["t1:1", "t1:2", "t1:2"]
    found = history(world, node)
    assert [(e["n"], e["source"], e["phase"]) for e in found["entries"]] == [
        (3, "node", "staged"),
        (2, "node", "offered"),
        (1, "server", "enrolled"),
    ]
    assert found["whole"] is True
    transaction = world.node(node.id)["transaction"]
    assert (transaction["tx"], transaction["phase"], transaction["reason_text"]) == ("t1", "staged", "why")


def test_a_late_event_does_not_take_the_transaction_back(world: World) -> None:
    node = world.new_node()
    send(node, event("t1", 5, "confirmed"))
    send(node, event("t1", 2, "staged"))
    assert world.node(node.id)["transaction"]["phase"] == "confirmed"


@pytest.mark.parametrize(
    "change",
    [
        {"id": "other:1"},
        {"id": "t1:x"},
        {"id": "t1"},
        {"phase": "No Phase"},
        {"wall": -1},
        {"tx": "a b"},
        {"line": ""},
    ],
)
def test_a_bad_event_stores_nothing(world: World, change: dict[str, Any]) -> None:
    node = world.new_node()
    answer = send(node, event("t1", 1, "offered"), {**event("t1", 2, "staged"), **change})
    assert answer.status_code == 400
    assert len(history(world, node)["entries"]) == 1


def test_too_many_events_at_once_are_refused(world: World) -> None:
    answer = send(world.new_node(), *(event("t1", n, "offered") for n in range(501)))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too-many-events")


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("UPDATE events SET reason_text = 'lies' WHERE node = ? AND n = 2", "entry 2 was altered"),
        ("UPDATE events SET wall = wall + 1 WHERE node = ? AND n = 3", "entry 3 was altered"),
        ("DELETE FROM events WHERE node = ? AND n = 2", "entry 2 is missing"),
        ("DELETE FROM events WHERE node = ? AND n = 4", "ends at entry 3, expected 4"),
    ],
)
def test_tampering_shows(world: World, statement: str, fault: str) -> None:
    node = world.new_node()
    send(node, *(event("t1", n, "staged") for n in range(1, 4)))
    assert history(world, node)["whole"] is True
    with sqlite3.connect(world.layout.database, timeout=60) as database:
        assert database.execute(statement, (node.id,)).rowcount == 1
    found = history(world, node)
    assert found["whole"] is False
    assert fault in found["fault"]


def test_what_operators_did_to_a_node_is_in_its_history(world: World) -> None:
    node = world.new_node()
    world.want("node", node.id, "1.0.0")
    with world.api() as api:
        api.post("/groups", json={"name": "moved"}).raise_for_status()
        api.put(f"/nodes/{node.id}/group", json={"group": "moved"}).raise_for_status()
        api.post(f"/nodes/{node.id}/revoke", json={"why": "sold"}).raise_for_status()
    found = history(world, node)
    assert [e["phase"] for e in found["entries"]] == ["revoked", "moved", "wanted", "enrolled"]
    assert "sold" in found["entries"][0]["reason_text"]
    assert found["whole"] is True


def test_the_oldest_entries_go_and_what_is_kept_is_still_a_chain(own_history: World) -> None:
    world = own_history
    node = world.new_node()
    for start in range(1, KEEP + SLACK + 1, 500):
        assert send(node, *(event("t1", n, "staged") for n in range(start, start + 500))).status_code == 200
    found = history(world, node)
    newest = found["entries"][0]["n"]
    with sqlite3.connect(world.layout.database, timeout=60) as database:
        count, oldest = database.execute("SELECT count(*), min(n) FROM events").fetchone()
        assert KEEP <= count <= KEEP + SLACK
        assert (found["whole"], found["removed"], oldest) == (True, newest - count, newest - count + 1)
        database.execute("UPDATE events SET wall = wall + 1 WHERE n = ?", (oldest,))
    assert f"entry {oldest} was altered" in history(world, node)["fault"]
    with sqlite3.connect(world.layout.database, timeout=60) as database:
        database.execute("DELETE FROM events WHERE n = ?", (oldest,))
    assert f"entry {oldest} is missing" in history(world, node)["fault"]


@pytest.fixture
def own_history(tmp_path: Path) -> Iterator[World]:
    with running(tmp_path) as world:
        yield world
