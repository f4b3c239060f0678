"""Orders and cold boots that end without anybody's word: too late, a node that is silent or revoked."""

from __future__ import annotations

import re
import sqlite3
import time
from dataclasses import replace

import pytest

from instar_server.domain import systems as rules
from tests.server.systems import at_work, new_node, order, report, say, slot, tell, view, wanted
from tests.server.test_history import event, send
from tests.server.test_systems_rules import GOOD, MADE, heard
from tests.server.world import WITHIN_S, Node, World

DAY = 86400.0


@pytest.fixture
def node(fleet: World) -> Node:
    return new_node(fleet)


def change(world: World, statement: str, *values: object) -> None:
    with sqlite3.connect(world.layout.database, timeout=60) as database:
        database.execute(statement, values)


def ordered_before(world: World, node: Node, by_s: float) -> None:
    change(world, "UPDATE system_updates SET made = made - ? WHERE node = ?", by_s, node.id)


def due_before(world: World, node: Node, by_s: float) -> None:
    change(world, "UPDATE nodes SET cold_boot_at = cold_boot_at - ? WHERE id = ?", by_s, node.id)


def silent_for(world: World, node: Node, by_s: float) -> None:
    told, until = view(world, node)["told"], time.monotonic() + WITHIN_S
    while written(world, node) != told:  # it is written in batches
        assert time.monotonic() < until
        time.sleep(0.05)
    change(world, "UPDATE nodes SET system_at = system_at - ? WHERE id = ?", by_s, node.id)


def written(world: World, node: Node) -> float:
    with sqlite3.connect(world.layout.database, timeout=WITHIN_S) as database:
        found: float = database.execute("SELECT system_at FROM nodes WHERE id = ?", (node.id,)).fetchone()[0]
    return found


# ---- orders that nobody begins


def test_an_order_of_which_nothing_was_heard_lapses(fleet: World, node: Node) -> None:
    made = order(fleet, node)
    ordered_before(fleet, node, 7 * DAY - 60)
    assert wanted(node)["lines"]["os"]["generation"] == made["generation"]
    ordered_before(fleet, node, 61)
    assert wanted(node)["lines"] == {}
    (shown,) = view(fleet, node)["updates"]
    assert (shown["state"], shown["outcome"], shown["code"]) == ("lapsed", "lapsed", "lapsed")
    assert "never begun" in shown["text"]
    assert shown["ended"] == pytest.approx(shown["made"] + 7 * DAY)
    assert fleet.ask("DELETE", f"/nodes/{node.id}/update-os", 404)["error"]["code"] == "not-found"
    again = order(fleet, node)
    assert again["generation"] > made["generation"]
    assert wanted(node)["lines"]["os"]["generation"] == again["generation"]
    assert [each["state"] for each in view(fleet, node)["updates"]] == ["open", "lapsed"]
    phases = [each["phase"] for each in fleet.history(node.id) if each["source"] == "server"]
    assert phases[:3] == ["system-ordered", "system-lapsed", "system-ordered"]


def test_it_lapses_also_when_nobody_looks(fleet: World, node: Node) -> None:
    order(fleet, node)
    ordered_before(fleet, node, 8 * DAY)
    until = time.monotonic() + WITHIN_S
    while "system-lapsed" not in [each["phase"] for each in fleet.history(node.id)]:
        assert time.monotonic() < until
        time.sleep(0.2)
    with sqlite3.connect(fleet.layout.database, timeout=60) as database:
        found = database.execute("SELECT state FROM system_updates WHERE node = ?", (node.id,)).fetchall()
    assert found == [("lapsed",)]


def test_one_that_the_node_has_told_of_does_not_lapse(fleet: World, node: Node) -> None:
    by_event, by_report = order(fleet, node), order(fleet, other := new_node(fleet))
    say(node, "t", by_event["generation"], "offered")
    tell(other, update=at_work("t", by_report["generation"], slot=""))
    for each, made in ((node, by_event), (other, by_report)):
        ordered_before(fleet, each, 300 * DAY)
        assert wanted(each)["lines"]["os"]["generation"] == made["generation"]
        assert view(fleet, each)["updates"][0]["state"] == "open"


def test_a_node_that_had_begun_all_the_same_has_the_last_word(fleet: World, node: Node) -> None:
    """It was cut off, and did all of it meanwhile."""
    made = order(fleet, node)
    ordered_before(fleet, node, 8 * DAY)
    order(fleet, node)
    say(node, "t", made["generation"], "offered", "trial", "confirmed")
    shown = view(fleet, node)["updates"][1]
    assert (shown["state"], shown["outcome"], shown["code"]) == ("confirmed", "confirmed", "")


def test_what_lapsed_stays_so_if_it_was_then_given_up() -> None:
    gone = rules.as_of(MADE, {}, None, MADE.made + rules.LAPSE_S)
    assert (gone.state, rules.outcome(gone, {})) == ("lapsed", "lapsed")
    back = heard(gone, ("t", 1, "offered", ""), ("t", 2, "reverting", "cancelled"), ("t", 3, "reverted", ""))
    assert (back.state, back.code) == ("lapsed", "cancelled")
    assert heard(gone, *GOOD).state == "confirmed"
    for ended in (gone, replace(MADE, state="confirmed"), replace(MADE, state="cancelled")):
        assert rules.as_of(ended, {}, 5.0, 1e12) == ended


def test_revoking_a_node_ends_its_order_and_its_cold_boot(fleet: World, node: Node) -> None:
    made = order(fleet, node)
    say(node, "t", made["generation"], "offered", "trial")
    fleet.ask("POST", f"/nodes/{node.id}/revoke", json={})
    (shown,) = view(fleet, node)["updates"]
    assert (shown["state"], shown["outcome"], shown["code"]) == ("cancelled", "cancelled", "revoked")
    assert fleet.ask("DELETE", f"/nodes/{node.id}/update-os", 404)["error"]["code"] == "not-found"
    other = new_node(fleet)
    fleet.ask("POST", f"/nodes/{other.id}/cold-boot", 202, json={})
    fleet.ask("POST", f"/nodes/{other.id}/revoke", json={})
    assert view(fleet, other)["cold_boot"] is None


# ---- cold boots that are late


def test_a_cold_boot_that_is_late_is_missed_and_may_be_ordered_again(fleet: World, node: Node) -> None:
    path = f"/nodes/{node.id}/cold-boot"
    made = fleet.ask("POST", path, 202, json={})
    assert made["missed"] is False
    due_before(fleet, node, 3500)
    assert wanted(node)["cold_boot"]["generation"] == made["generation"]
    assert view(fleet, node)["cold_boot"]["missed"] is False
    due_before(fleet, node, 101)
    assert "cold_boot" not in wanted(node)
    assert view(fleet, node)["cold_boot"] == {**made, "at": made["at"] - 3601, "missed": True}
    again = fleet.ask("POST", path, 202, json={})
    assert again["generation"] > made["generation"]
    assert wanted(node)["cold_boot"]["generation"] == again["generation"]
    due_before(fleet, node, 30 * DAY)
    assert fleet.ask("DELETE", path) == {"deleted": True}
    assert view(fleet, node)["cold_boot"] is None


def test_a_late_cold_boot_that_the_node_has_begun_is_still_wanted(fleet: World, node: Node) -> None:
    made = fleet.ask("POST", f"/nodes/{node.id}/cold-boot", 202, json={})
    tell(node, update=at_work("c", made["generation"], "verify"))
    due_before(fleet, node, 3700)
    assert wanted(node)["cold_boot"]["generation"] == made["generation"]
    assert view(fleet, node)["cold_boot"]["missed"] is False
    say(node, "c", made["generation"], "offered", "trial", "confirmed")
    assert view(fleet, node)["cold_boot"] is None


def test_a_cold_boot_that_a_dead_node_had_begun_is_cancelled(fleet: World, node: Node) -> None:
    path = f"/nodes/{node.id}/cold-boot"
    made = fleet.ask("POST", path, 202, json={})
    tell(node, update=at_work("c", made["generation"], "activate"))
    error = fleet.ask("DELETE", path, 412)["error"]
    assert error["code"] == "failed-precondition"
    assert re.search(r"under way \(activate\); it said so at .* counts until \S+ \S+Z$", error["message"])
    silent_for(fleet, node, 7300.0)
    say(node, "c", made["generation"], "offered")  # its events are a word of it, too
    assert "counts until" in fleet.ask("DELETE", path, 412)["error"]["message"]
    change(fleet, "UPDATE events SET stored_at = stored_at - 7300 WHERE node = ?", node.id)
    change(fleet, "UPDATE nodes SET tx_at = tx_at - 7300 WHERE id = ?", node.id)
    assert fleet.ask("DELETE", path) == {"deleted": True}
    assert "cold_boot" not in wanted(node)
    order(fleet, node)


# ---- how an order that has ended is shown


def test_a_later_order_of_the_same_bundle_changes_nothing_of_an_earlier_one(fleet: World, node: Node) -> None:
    first = order(fleet, node, bundle="web-1.1.0")
    say(node, "t1", first["generation"], "offered", "trial", "confirmed")
    good = slot("1.1.0", first["digest"])
    tell(node, report(running="b", slots={"a": slot(), "b": good}))
    again = order(fleet, node)
    say(node, "t2", again["generation"], "offered", "reverted", reason={"code": "altered-chunk", "text": "x"})
    bad = good | {"state": "bad", "why": "third try failed"}
    tell(node, report(slots={"a": slot(), "b": bad}))
    shown = view(fleet, node)["updates"]
    assert [(each["outcome"], each["code"]) for each in shown] == [
        ("unavailable", "altered-chunk"),
        ("confirmed", ""),
    ]


@pytest.mark.parametrize(
    ("later", "outcome"),
    [
        ({"state": "confirmed", "tx": "t"}, "confirmed"),
        ({"state": "open", "tx": "t"}, "confirmed"),
        ({"state": "reverted", "tx": "t", "code": "cut-off"}, "confirmed"),
        ({"state": "reverted", "tx": "t", "code": "already-running"}, "left"),
        ({"state": "reverted", "tx": "t", "code": "wrong-hardware"}, "left"),
        ({"state": "cancelled"}, "left"),
        ({"state": "lapsed"}, "left"),
        ({"state": "confirmed", "tx": "t", "digest": "e" * 96}, "left"),
    ],
)
def test_a_slot_is_judged_for_the_newest_order_that_may_have_written_it(
    later: dict[str, str], outcome: str
) -> None:
    updates = [replace(MADE, id="os-2", generation=8, **later), heard(MADE, *GOOD)]  # type: ignore[arg-type]
    bad = slot("1.1.0", MADE.digest, state="bad", why="third try failed")
    assert rules.all_as_json(updates, report(slots={"b": bad}))[1]["outcome"] == outcome


@pytest.mark.parametrize(("wish", "back"), [("tx-0", "tx-f"), ("tx-f", "tx-0")])
def test_transactions_of_one_batch_are_heard_in_the_order_in_which_they_were_sent(
    fleet: World, node: Node, wish: str, back: str
) -> None:
    """A rollback has the generation of the wish that it overrules; names of transactions are chance."""
    made = order(fleet, node, activation="none")

    def told(tx: str, number: int, phase: str, digest: str) -> dict[str, object]:
        return event(
            tx, number, phase, line="os", generation=made["generation"], slot="b", mode="none", digest=digest
        )

    mine, other = made["digest"], "c" * 96
    answer = send(
        node, told(wish, 2, "confirmed", mine), told(wish, 1, "offered", mine), told(back, 1, "offered", other),
        told(back, 2, "confirmed", other),
    )  # fmt: skip
    assert answer.status_code == 200
    assert view(fleet, node)["updates"][0]["outcome"] == "installed, not active"
