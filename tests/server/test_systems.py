"""Updates of a node's operating system: ordered over the API, told to a played node, ended by its events."""

from __future__ import annotations

import calendar
import concurrent.futures
import re
import sqlite3
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import systems
from tests.server.systems import at_work, new_node, order, say, slot, tell, view, wanted
from tests.server.test_history import event, send
from tests.server.world import Node, World


@pytest.fixture
def node(fleet: World) -> Node:
    return new_node(fleet)


def rows(world: World, node: Node) -> tuple[Any, ...]:
    """All that an order may write of a node."""
    with sqlite3.connect(world.layout.database, timeout=60) as database:
        updates = database.execute("SELECT * FROM system_updates WHERE node = ?", (node.id,)).fetchall()
        events = database.execute("SELECT n FROM events WHERE node = ?", (node.id,)).fetchall()
        cold = database.execute(
            "SELECT cold_boot_at, cold_boot_generation FROM nodes WHERE id = ?", (node.id,)
        ).fetchall()
        counter = database.execute("SELECT value FROM counters WHERE name = 'generation'").fetchall()
    return updates, events, cold, counter


# ---- an order and its end


def test_an_order_is_told_to_the_node_until_it_has_ended(fleet: World, node: Node) -> None:
    assert "os" not in wanted(node)["lines"]
    made = order(fleet, node, activation="kexec", override_cold_boot=True)
    assert made["id"].startswith("os-")
    assert len(made["id"]) == 15
    assert (made["state"], made["outcome"], made["mode"], made["phase"]) == ("open", "", "kexec", "")
    custom = next(
        each["custom"]
        for each in fleet.ask("GET", "/releases")["bundles"]
        if each["target"] == made["target"]
    )
    assert wanted(node)["lines"] == {
        "os": {
            "version": "1.1.0", "digest": custom["digest"], "target": "os/web-1.1.0.bundle",
            "generation": made["generation"], "mode": "kexec", "override": True,
        }
    }  # fmt: skip
    g = made["generation"]
    say(
        node,
        "t1",
        g,
        "offered",
        "staged",
        "verified",
        "rehearsed",
        "trial",
        "confirming",
        from_version="1.0.0",
    )
    assert wanted(node)["lines"]["os"]["generation"] == g
    (shown,) = view(fleet, node)["updates"]
    assert (shown["state"], shown["phase"], shown["slot"], shown["tx"]) == ("open", "confirming", "b", "t1")
    say(node, "t1", g, "confirmed", first=7)
    assert "os" not in wanted(node)["lines"]
    (shown,) = view(fleet, node)["updates"]
    assert (shown["state"], shown["outcome"], shown["ended"] is not None) == ("confirmed", "confirmed", True)


def test_a_reverted_update_keeps_its_reason(fleet: World, node: Node) -> None:
    made = order(fleet, node)
    why = {"code": "altered-bundle", "text": "cannot trust it"}
    say(node, "t", made["generation"], "offered", "reverting", reason=why)
    say(node, "t", made["generation"], "reverted", first=3)
    (shown,) = view(fleet, node)["updates"]
    assert (shown["state"], shown["outcome"]) == ("reverted", "unavailable")
    assert (shown["code"], shown["text"]) == ("altered-bundle", "cannot trust it")
    again = order(fleet, node)
    assert again["generation"] > made["generation"]
    assert [each["id"] for each in view(fleet, node)["updates"]] == [again["id"], made["id"]]


def test_a_rollback_on_the_node_does_not_confirm_what_it_went_against(fleet: World, node: Node) -> None:
    made = order(fleet, node)
    say(node, "back", made["generation"], "offered", "trial", "confirming", "confirmed", digest="e" * 96)
    (shown,) = view(fleet, node)["updates"]
    assert (shown["state"], shown["code"], shown["outcome"]) == ("reverted", "superseded", "unavailable")
    again = order(fleet, node)
    say(node, "t", again["generation"], "offered", "trial", "confirmed", digest=again["digest"])
    assert view(fleet, node)["updates"][0]["outcome"] == "confirmed"


def test_the_history_shows_slot_versions_mode_and_why(fleet: World, node: Node) -> None:
    made = order(fleet, node, activation="kexec")
    why = {"code": "fell-back", "text": "slot a came up in place of slot b"}
    say(node, "t", made["generation"], "trial", "reverting", reason=why, from_version="1.0.0", mode="kexec")
    history = fleet.ask("GET", f"/nodes/{node.id}/history")
    last = history["entries"][0]
    assert (last["line"], last["phase"], last["slot"], last["mode"]) == ("os", "reverting", "b", "kexec")
    assert (last["from_version"], last["version"], last["generation"]) == (
        "1.0.0",
        "1.1.0",
        made["generation"],
    )
    assert last["reason_text"] == why["text"]
    ordered = history["entries"][2]
    assert (ordered["source"], ordered["phase"], ordered["mode"]) == ("server", "system-ordered", "kexec")
    assert made["id"] in ordered["reason_text"]
    assert history["whole"] is True
    with sqlite3.connect(fleet.layout.database, timeout=60) as database:
        database.execute("UPDATE events SET slot = 'a' WHERE node = ? AND n = ?", (node.id, last["n"]))
    assert "was altered" in fleet.ask("GET", f"/nodes/{node.id}/history")["fault"]


def test_events_without_a_generation_are_stored_as_ever_and_end_nothing(fleet: World, node: Node) -> None:
    made = order(fleet, node)
    answer = send(node, event("old", 1, "confirmed", line="os"), event("old2", 1, "confirmed"))
    assert answer.json()["stored"] == ["old:1", "old2:1"]
    assert view(fleet, node)["updates"][0]["state"] == "open"
    assert fleet.ask("GET", f"/nodes/{node.id}/history")["entries"][0]["generation"] == 0
    other = new_node(fleet)
    say(other, "t", made["generation"], "confirmed")  # another node's word counts for nobody
    say(node, "agents", made["generation"], "confirmed", line="agent", slot="", mode="")
    assert view(fleet, node)["updates"][0]["state"] == "open"


@pytest.mark.parametrize(
    "change", [{"generation": -1}, {"generation": "1"}, {"generation": 1.5}, {"slot": "x" * 9}, {"mode": 1}]
)
def test_a_bad_event_stores_nothing(fleet: World, node: Node, change: dict[str, Any]) -> None:
    before = rows(fleet, node)
    assert send(node, event("t", 1, "offered", line="os", **change)).status_code == 400
    assert rows(fleet, node) == before


# ---- what is refused, with nothing written


def refused(world: World, node: Node, status: int, code: str, **body: Any) -> str:
    before = rows(world, node)
    error = order(world, node, status, **body)["error"]
    assert error["code"] == code
    assert rows(world, node) == before
    assert "os" not in wanted(node)["lines"] or before[0]
    return str(error["message"])


@pytest.mark.parametrize("activation", [..., None, "", "REBOOT", "halt", "reboot ", 1, True, [], {}])
def test_an_activation_left_out_or_unknown_is_an_invalid_argument(
    fleet: World, node: Node, activation: Any
) -> None:
    assert "expected" in refused(fleet, node, 400, "invalid-argument", activation=activation)


@pytest.mark.parametrize(
    "bundle", [..., None, "", 7, ["web-1.1.0"], "web", "http://h/web-1.1.0.bundle", "x" * 10_000]
)
def test_a_malformed_bundle_is_an_invalid_argument(fleet: World, node: Node, bundle: Any) -> None:
    refused(fleet, node, 400, "invalid-argument", bundle=bundle)


def test_what_is_not_there_is_not_found(fleet: World, node: Node) -> None:
    for bundle in ("web-9.9.9", "os/web-9.9.9.bundle", "https://127.0.0.1/web-9.9.9.bundle"):
        assert "os/web-9.9.9.bundle" in refused(fleet, node, 404, "not-found", bundle=bundle)
    nobody = "n-0000000000000000"
    assert order(fleet, nobody, 404)["error"]["code"] == "not-found"
    for method, path in (
        ("GET", "system"), ("GET", "system/events"), ("DELETE", "update-os"), ("DELETE", "cold-boot"),
    ):  # fmt: skip
        assert fleet.ask(method, f"/nodes/{nobody}/{path}", 404)["error"]["code"] == "not-found"
    assert fleet.ask("POST", f"/nodes/{nobody}/cold-boot", 404, json={})["error"]["code"] == "not-found"


def test_a_second_one_is_aborted_and_named(fleet: World, node: Node) -> None:
    first = order(fleet, node)
    for phases in ((), ("offered",), ("staged", "verified")):
        if phases:
            say(node, "t", first["generation"], *phases, first=len(phases) + 1)
        assert first["id"] in refused(fleet, node, 409, "aborted")
    assert fleet.ask("POST", f"/nodes/{node.id}/cold-boot", 409, json={})["error"]["code"] == "aborted"


def test_what_the_node_does_by_itself_aborts_too(fleet: World, node: Node) -> None:
    """A transaction that was ordered over the node's own API has no generation of ours."""
    tell(node, update=at_work("pushed", 0))
    assert "pushed" in refused(fleet, node, 409, "aborted")
    say(node, "pushed", 0, "offered", "staged", "trial")
    tell(node)  # the report says no more of it, and its events have not ended
    assert "pushed" in refused(fleet, node, 409, "aborted")
    assert fleet.ask("POST", f"/nodes/{node.id}/cold-boot", 409, json={})["error"]["code"] == "aborted"
    say(node, "pushed", 0, "confirmed", first=4)
    order(fleet, node)


def set_back(world: World, node: Node, by_s: float) -> None:
    """As if the node had said all this so long ago."""
    with sqlite3.connect(world.layout.database, timeout=60) as database:
        database.execute("UPDATE nodes SET tx_at = tx_at - ?1 WHERE id = ?2", (by_s, node.id))
        database.execute("UPDATE events SET stored_at = stored_at - ?1 WHERE node = ?2", (by_s, node.id))


def test_what_a_node_never_takes_back_aborts_for_two_hours(fleet: World, node: Node) -> None:
    """Its journals were lost, or itself."""
    say(node, "pushed", 0, "offered", "staged", "trial")
    set_back(fleet, node, 7000.0)
    why = refused(fleet, node, 409, "aborted")
    said, until = (
        calendar.timegm(time.strptime(each, "%Y-%m-%d %H:%M:%SZ"))
        for each in re.findall(r"(?:said so at|counts until) (\S+ \S+Z)", why)
    )
    assert abs(said - (time.time() - 7000)) < 60
    assert until - said == 7200
    set_back(fleet, node, 300.0)
    order(fleet, node)


def test_a_report_from_before_the_end_aborts_nothing(fleet: World, node: Node) -> None:
    tell(node, update=at_work("pushed", 0, "confirm"))
    say(node, "pushed", 0, "confirming", "confirmed")
    order(fleet, node)


def test_what_cannot_fit_is_a_failed_precondition(fleet: World, node: Node) -> None:
    assert "wrong-hardware" in refused(fleet, node, 412, "failed-precondition", bundle="other-1.1.0")
    assert "too-old-system" in refused(fleet, node, 412, "failed-precondition", bundle="web-1.2.0")
    tell(node, arch="aarch64")
    assert "wrong-hardware" in refused(fleet, node, 412, "failed-precondition")
    silent = fleet.new_node()
    assert "no-slots" in refused(fleet, silent, 412, "failed-precondition")
    tell(silent, slots={}, running="", backend="")
    assert "no-slots" in refused(fleet, silent, 412, "failed-precondition")
    fault = {"code": "unknown-slot", "text": "the root lies on neither slot"}
    tell(silent, slots={}, running="", backend="", boot={}, error=fault)
    assert "unknown-slot: the root lies" in refused(fleet, silent, 412, "failed-precondition")
    assert view(fleet, silent)["error"] == fault
    answer = fleet.ask("POST", f"/nodes/{silent.id}/cold-boot", 412, json={})
    assert answer["error"]["code"] == "failed-precondition"


def test_a_version_is_believed_only_when_it_is_newer_than_the_last_update(fleet: World, node: Node) -> None:
    made = order(fleet, node)
    say(node, "t", made["generation"], "trial", "confirmed")
    order(fleet, node, bundle="web-1.2.0")  # the report still says 1.0.0: the node will know
    other = new_node(fleet, slots={"a": slot("1.1.0"), "b": slot()})
    order(fleet, other, bundle="web-1.2.0")


def test_a_revoked_node_is_a_failed_precondition(fleet: World, node: Node) -> None:
    with fleet.api() as api:
        api.post(f"/nodes/{node.id}/revoke", json={}).raise_for_status()
    answer = order(fleet, node, 412)
    assert "revoked" in answer["error"]["message"]


def test_a_bundle_whose_file_is_gone_or_forged_is_unavailable(fleet: World, tmp_path: Path) -> None:
    node = new_node(fleet)
    gone = systems.publish(fleet, "3.0.0")
    folder = fleet.layout.trust / "targets" / "os"
    (folder / f"{gone.sha256}.web-3.0.0.bundle").unlink()
    assert "blob-missing" in refused(fleet, node, 503, "unavailable", bundle="web-3.0.0")
    path, built = systems.make_bundle(tmp_path, "web", "3.1.0")
    # Put back for those who publish after us.
    (folder / f"{gone.sha256}.web-3.0.0.bundle").write_bytes(gone.archive)
    systems.publish_file(fleet, path, built.custom | {"digest": "f" * 96})
    assert "altered-bundle" in refused(fleet, node, 503, "unavailable", bundle="web-3.1.0")
    rubbish = tmp_path / "rubbish"
    rubbish.write_bytes(b"no bundle at all")
    systems.publish_file(fleet, rubbish, built.custom | {"version": "3.2.0"})
    assert "bad-bundle" in refused(fleet, node, 503, "unavailable", bundle="web-3.2.0")


def test_viewers_look_and_do_nothing(fleet: World, node: Node) -> None:
    order(fleet, node)
    with fleet.api() as api:
        token = api.post("/api-tokens", json={"role": "viewer"}).json()["token"]
    before = rows(fleet, node)
    base = f"/nodes/{node.id}"
    with fleet.api(token) as api:
        calls = [
            api.post(f"{base}/update-os", json={"bundle": "web-1.1.0", "activation": "none"}),
            api.delete(f"{base}/update-os"),
            api.post(f"{base}/cold-boot", json={}),
            api.delete(f"{base}/cold-boot"),
        ]
        assert [each.status_code for each in calls] == [403] * 4
        assert {each.json()["error"]["code"] for each in calls} == {"role-too-low"}
        assert api.get(f"{base}/system").status_code == 200
    assert rows(fleet, node) == before
    with fleet.api("nonsense") as api:
        assert api.get(f"{base}/system").status_code == 401


def test_of_calls_at_the_same_time_exactly_one_gets_through(fleet: World) -> None:
    """Eight connections, all ready before any of them asks."""
    for _ in range(5):
        node = new_node(fleet)
        clients = [fleet.api() for _ in range(8)]
        for client in clients:
            client.get("/health").raise_for_status()

        def call(client: httpx.Client, node: Node = node) -> tuple[int, str]:
            body = {"bundle": "web-1.1.0", "activation": "reboot"}
            answer = client.post(f"/nodes/{node.id}/update-os", json=body)
            return answer.status_code, answer.json().get("error", {}).get("code", "")

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            said = sorted(pool.map(call, clients))
        for client in clients:
            client.close()
        assert said == [(202, "")] + [(409, "aborted")] * 7
        assert len(rows(fleet, node)[0]) == 1


def test_the_database_itself_allows_one_at_a_time(fleet: World, node: Node) -> None:
    order(fleet, node)
    with sqlite3.connect(fleet.layout.database, timeout=60) as database:
        names = ", ".join(
            name for _, name, *_ in database.execute("PRAGMA table_info(system_updates)")
            if name not in ("id", "generation")
        )  # fmt: skip
        again = f"INSERT INTO system_updates (id, generation, {names}) SELECT 'os-2', 999999, {names}"
        again += " FROM system_updates WHERE node = ?"
        with pytest.raises(sqlite3.IntegrityError):
            database.execute(again, (node.id,))


# ---- taking it back


def test_an_open_one_is_cancelled_until_the_switch(fleet: World, node: Node) -> None:
    assert fleet.ask("DELETE", f"/nodes/{node.id}/update-os", 404)["error"]["code"] == "not-found"
    order(fleet, node)
    gone = fleet.ask("DELETE", f"/nodes/{node.id}/update-os")
    assert (gone["state"], gone["outcome"]) == ("cancelled", "cancelled")
    assert "os" not in wanted(node)["lines"]
    made = order(fleet, node)
    tell(node, update=at_work("t", made["generation"], "activate"))
    assert fleet.ask("DELETE", f"/nodes/{node.id}/update-os", 412)["error"]["code"] == "failed-precondition"
    tell(node, update=at_work("t", made["generation"], "verify"))
    say(node, "t", made["generation"], "offered", "staged", "trial")
    assert fleet.ask("DELETE", f"/nodes/{node.id}/update-os", 412)["error"]["code"] == "failed-precondition"
    entries = [each["phase"] for each in fleet.history(node.id) if each["source"] == "server"]
    assert entries[:3] == ["system-ordered", "system-cancelled", "system-ordered"]


def test_one_of_which_nothing_was_heard_for_long_is_cancelled_also_past_the_switch(
    fleet: World, node: Node
) -> None:
    """The node died on trial. Repaired, it would begin with it unasked."""
    made = order(fleet, node)
    say(node, "t", made["generation"], "offered", "trial")
    set_back(fleet, node, 7000.0)
    error = fleet.ask("DELETE", f"/nodes/{node.id}/update-os", 412)["error"]
    assert "past the switch (trial)" in error["message"]
    assert "counts until" in error["message"]
    set_back(fleet, node, 300.0)
    tell(node, update=at_work("t", made["generation"], "watch"))  # it lives, and is at it
    fleet.ask("DELETE", f"/nodes/{node.id}/update-os", 412)
    tell(node)
    gone = fleet.ask("DELETE", f"/nodes/{node.id}/update-os")
    assert (gone["state"], gone["phase"]) == ("cancelled", "trial")
    assert "os" not in wanted(node)["lines"]
    order(fleet, node)
    say(node, "t", made["generation"], "confirmed", first=3)  # it was alive all the same
    assert [each["state"] for each in view(fleet, node)["updates"]] == ["open", "confirmed"]


# ---- a server that was restored from a backup


def test_generations_given_out_after_the_backup_are_not_given_again(fleet: World, node: Node) -> None:
    """The node has them in its journals, and would never begin with an order of an older one."""
    before = order(fleet, node)["generation"]
    fleet.ask("DELETE", f"/nodes/{node.id}/update-os")
    with sqlite3.connect(fleet.layout.database, timeout=60) as database:
        database.execute("UPDATE counters SET value = 0 WHERE name = 'generation'")
    made = order(fleet, node)["generation"]
    assert made > before
    fleet.ask("DELETE", f"/nodes/{node.id}/update-os")
    assert fleet.ask("POST", f"/nodes/{node.id}/cold-boot", 202, json={})["generation"] > made


def test_an_order_that_a_forgotten_one_has_outrun_ends(fleet: World, node: Node) -> None:
    made = order(fleet, node)
    say(node, "old", made["generation"] - 1, "trial", "confirmed")
    assert view(fleet, node)["updates"][0]["state"] == "open"
    say(node, "newer", made["generation"] + 50, "offered")
    (shown,) = view(fleet, node)["updates"]
    assert (shown["state"], shown["code"], shown["outcome"]) == ("reverted", "superseded", "unavailable")
    assert str(made["generation"] + 50) in shown["text"]
    assert "os" not in wanted(node)["lines"]
    say(node, "newer", made["generation"] + 50, "reverted", first=2)
    order(fleet, node)


def test_what_a_node_had_begun_before_it_was_cancelled(fleet: World, node: Node) -> None:
    made = order(fleet, node)
    say(node, "t", made["generation"], "offered", "staged")
    fleet.ask("DELETE", f"/nodes/{node.id}/update-os")
    assert "t (staged)" in refused(fleet, node, 409, "aborted")  # it still works on it
    say(node, "t", made["generation"], "reverting", "reverted", first=3, reason={"code": "x", "text": ""})
    (shown,) = view(fleet, node)["updates"]
    assert (shown["state"], shown["phase"]) == ("cancelled", "reverted")
    order(fleet, node)


# ---- cold boots


def test_a_cold_boot_is_wanted_until_it_is_done(fleet: World, node: Node) -> None:
    assert "cold_boot" not in wanted(node)
    now = time.time()
    first = fleet.ask("POST", f"/nodes/{node.id}/cold-boot", 202, json={})
    assert now - 1 <= first["at"] <= time.time() + 1
    made = fleet.ask("POST", f"/nodes/{node.id}/cold-boot", 202, json={"at": now + 7200})
    assert made == {"at": now + 7200, "generation": made["generation"], "missed": False}
    assert made["generation"] > first["generation"]
    assert view(fleet, node)["cold_boot"] == made
    del made["missed"]
    assert wanted(node)["cold_boot"] == made
    say(node, "early", first["generation"], "confirmed", mode="reboot")  # of the one whose place was taken
    assert wanted(node)["cold_boot"] == made
    say(node, "c", made["generation"], "offered", "trial")
    assert wanted(node)["cold_boot"] == made
    say(node, "c", made["generation"], "confirmed", first=3)
    assert "cold_boot" not in wanted(node)
    assert view(fleet, node)["updates"] == []


def test_a_cold_boot_is_cancelled_unless_it_is_under_way(fleet: World, node: Node) -> None:
    path = f"/nodes/{node.id}/cold-boot"
    assert fleet.ask("DELETE", path, 404)["error"]["code"] == "not-found"
    fleet.ask("POST", path, 202, json={"at": None})
    assert fleet.ask("DELETE", path) == {"deleted": True}
    assert "cold_boot" not in wanted(node)
    made = fleet.ask("POST", path, 202, json={})
    tell(node, update=at_work("c", made["generation"], "watch"))
    assert fleet.ask("DELETE", path, 412)["error"]["code"] == "failed-precondition"
    assert "at work on c" in refused(fleet, node, 409, "aborted")
    assert fleet.ask("POST", path, 409, json={})["error"]["code"] == "aborted"


@pytest.mark.parametrize("at", [0, -1, 1e12, 1e300, 5e9])
def test_a_cold_boot_at_no_time_is_an_invalid_argument(fleet: World, node: Node, at: float) -> None:
    before = rows(fleet, node)
    answer = fleet.ask("POST", f"/nodes/{node.id}/cold-boot", 400, json={"at": at})
    assert answer["error"]["code"] == "invalid-argument"
    assert rows(fleet, node) == before
