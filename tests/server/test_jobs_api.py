"""The API of orders: who may, what is refused and changes nothing, who is meant, pages, events."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from typing import Any

import pytest

from tests.server.test_channel import eventually
from tests.server.world import Node, World


def post(world: World, path: str = "/jobs", status: int = 200, **body: Any) -> Any:
    return world.ask("POST", path, status, json=body)


def count(world: World) -> int:
    with sqlite3.connect(world.layout.database, timeout=60) as database:
        return int(database.execute("SELECT count(*) FROM orders").fetchone()[0])


def stored(world: World, node: Node) -> tuple[str, str]:
    """Version and machine of a node's agent, as the database has them."""
    with sqlite3.connect(world.layout.database, timeout=60) as database:
        words = "SELECT agent_version, arch FROM nodes WHERE id = ?"
        version, arch = database.execute(words, (node.id,)).fetchone()
    return version, arch


@pytest.fixture
def node(world: World) -> Node:
    return world.new_node()


def test_roles(world: World, node: Node) -> None:
    """A viewer may look; to order and to cancel is for operators."""
    tokens = {role: post(world, "/api-tokens", 201, role=role)["token"] for role in ("viewer", "operator")}
    body = {"module": "echo", "select": {"nodes": [node.id]}}
    restart = {"select": {"nodes": [node.id]}}
    with world.api(tokens["operator"]) as api:
        ordered = api.post("/jobs", json=body).json()
        assert api.post("/restarts", json=restart).status_code == 200
        assert ordered["made_by"] != ""
    path = f"/jobs/{ordered['id']}"
    with world.api(tokens["viewer"]) as api:
        for method, where, sent in (
            ("POST", "/jobs", body), ("POST", "/restarts", restart), ("POST", f"{path}/cancel", None),
            ("POST", f"/nodes/{node.id}/poke", None),
        ):  # fmt: skip
            refused = api.request(method, where, json=sent)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "role-too-low"), where
        for where in ("/jobs", path, "/modules"):
            assert api.get(where).status_code == 200
        with api.stream("GET", f"{path}/events", params={"for_s": 0}) as stream:
            assert stream.status_code == 200


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"module": "nothing"}, 400, "unknown-module"),
        ({"version": "9.9.9"}, 400, "unknown-module"),
        ({"module": "No Name"}, 422, "bad-request"),
        ({"select": {}}, 400, "bad-selector"),
        ({"select": {"all": True, "group": "default"}}, 400, "bad-selector"),
        ({"select": {"nodes": ["n-0000000000000000"]}}, 404, "unknown-node"),
        ({"select": {"nodes": ["nobody"]}}, 422, "bad-request"),
        ({"select": {"group": "no-such-group"}}, 404, "unknown-group"),
        ({"select": {"where": {"planet": "mars"}}}, 400, "no-nodes"),
        ({"select": {"where": {"os": ["linux"]}}}, 422, "bad-request"),
        ({"select": {"all": True, "whom": "x"}}, 422, "bad-request"),
        ({"args": {"x": "y" * 140_000}}, 400, "bad-args"),
        ({"args": [1]}, 422, "bad-request"),
        ({"deadline_s": 0}, 422, "bad-request"),
        ({"deadline_s": 1e6}, 422, "bad-request"),
        ({"lapse_s": 1e9}, 422, "bad-request"),
        ({"wait_s": 1e4}, 422, "bad-request"),
    ],
    ids=range(17),
)
def test_a_bad_order_is_named_and_changes_nothing(
    world: World, node: Node, change: dict[str, Any], status: int, code: str
) -> None:
    before = count(world)
    body = {"module": "echo", "select": {"nodes": [node.id]}, **change}
    assert post(world, "/jobs", status, **body)["error"]["code"] == code
    assert count(world) == before


def test_arguments_that_no_frame_can_carry_are_refused(world: World, node: Node) -> None:
    body = json.dumps({"module": "echo", "select": {"nodes": [node.id]}, "args": {"x": "\ud800"}})
    with world.api() as api:
        answer = api.post("/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422), answer.text


def test_a_group_that_is_empty_is_nobody(world: World) -> None:
    group = f"g{os.urandom(3).hex()}"
    post(world, "/groups", name=group)
    assert post(world, "/jobs", 400, module="echo", select={"group": group})["error"]["code"] == "no-nodes"


def test_unknown_orders(world: World) -> None:
    unknown = f"/jobs/o-{'0' * 24}"
    for method, path in (("GET", unknown), ("POST", f"{unknown}/cancel"), ("GET", f"{unknown}/events")):
        assert world.ask(method, path, 404)["error"]["code"] == "unknown-order"
    assert world.ask("GET", "/jobs/nonsense", 422)["error"]["code"] == "bad-request"


def test_versions(world: World, node: Node) -> None:
    """The newest, or the one that is named; the one that rides in every program needs no publishing."""
    select = {"nodes": [node.id]}
    assert post(world, module="echo", select=select)["version"] == "1.10.0"
    named = post(world, module="echo", select=select, version="1.2.0")
    assert (named["version"], named["digest"]) == ("1.2.0", world.operator.modules["echo", "1.2.0"].digest)
    assert post(world, module="selftest", select=select)["version"] == ""
    assert post(world, "/jobs", 400, module="selftest", select=select, version="1.0.0")["error"]["code"]


def test_published_modules(world: World) -> None:
    found = world.ask("GET", "/modules")["modules"]
    seen = [(each["name"], each["version"], each["mode"]) for each in found]
    assert seen == [
        ("echo", "1.10.0", "oneshot"), ("echo", "1.2.0", "oneshot"), ("echo", "1.0.0", "oneshot"),
        ("inventory", "1.1.0", "service"), ("inventory", "1.0.0", "service"),
    ]  # fmt: skip
    assert all(each["custom"]["kind"] == "module" for each in found)
    assert {each["version"] for each in world.ask("GET", "/releases")["releases"]} == {"1.0.0", "1.1.0"}


async def test_who_is_meant(world: World) -> None:
    """Groups, hellos and facts; the revoked are nobody."""
    group = f"g{os.urandom(3).hex()}"
    facts: list[dict[str, Any]] = [{"rack": 4, "ssd": True}, {"rack": 5, "os": "BSD"}, {"rack": 4}, {}]
    nodes = [await asyncio.to_thread(world.new_node, group, each) for each in facts]
    gone = await asyncio.to_thread(world.new_node, group, facts[0])
    await asyncio.to_thread(post, world, f"/nodes/{gone.id}/revoke")
    async with nodes[2].channel() as channel:
        await channel.hello("1.1.0", arch="riscv64")
        await channel.read_type("welcome")
    await eventually(lambda: stored(world, nodes[2]) == ("1.1.0", "riscv64"))  # it is written in batches
    ids = [node.id for node in nodes]
    for select, meant in (
        ({"group": group}, [0, 1, 2, 3]),
        ({"group": group, "where": {"rack": 4}}, [0, 2]),
        ({"group": group, "where": {"rack": "4", "ssd": True}}, [0]),
        ({"where": {"rack": 4, "arch": "riscv64"}}, [2]),
        ({"group": group, "where": {"os": "BSD"}}, [1]),
        ({"group": group, "where": {"os": "test"}}, [2]),
        ({"group": group, "where": {"version": "1.1.0"}}, [2]),
        ({"nodes": [ids[3], ids[0], ids[0]]}, [0, 3]),
        ({"nodes": ids[:3], "where": {"rack": 4}}, [0, 2]),
    ):
        ordered = await asyncio.to_thread(post, world, module="echo", select=select)
        assert {row["node"] for row in ordered["rows"]} == {ids[n] for n in meant}, select
        assert ordered["nodes"] == len(meant)
    everyone = await asyncio.to_thread(post, world, module="echo", select={"all": True})
    assert set(ids) <= {row["node"] for row in everyone["rows"]}
    assert gone.id not in {row["node"] for row in everyone["rows"]}


def test_pages_of_rows(world: World) -> None:
    group = f"g{os.urandom(3).hex()}"
    ids = sorted(world.new_node(group).id for _ in range(5))
    ordered = post(world, module="echo", select={"group": group})
    assert ([row["node"] for row in ordered["rows"]], ordered["next"]) == (ids, None)
    found: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = world.ask("GET", f"/jobs/{ordered['id']}", params=query)
        assert page["states"] == {"queued": 5}
        found += [row["node"] for row in page["rows"]]
        if page["next"] is None:
            break
        query["after"] = page["next"]
    assert found == ids


async def test_a_page_is_bounded_in_bytes(world: World) -> None:
    """Two hundred thousand bytes of each of 45 nodes are more than one answer holds."""
    group = f"g{os.urandom(3).hex()}"
    nodes = [await asyncio.to_thread(world.new_node, group) for _ in range(45)]
    ordered = await asyncio.to_thread(post, world, module="echo", select={"group": group})

    async def reply(node: Node) -> None:
        async with node.connected() as channel:
            await channel.answer(await channel.job(), reply={"x": "y" * 200_000})

    for node in nodes:
        await reply(node)
    first = await asyncio.to_thread(world.ask, "GET", f"/jobs/{ordered['id']}")
    assert len(first["rows"]) == 8 * 1024 * 1024 // 200_100
    assert first["next"] == first["rows"][-1]["node"]
    query = {"after": first["next"]}
    rest = await asyncio.to_thread(world.ask, "GET", f"/jobs/{ordered['id']}", params=query)
    assert (len(first["rows"]) + len(rest["rows"]), rest["next"]) == (45, None)


def test_the_list_is_newest_first_and_in_pages(world: World, node: Node) -> None:
    select = {"nodes": [node.id]}
    ids = [post(world, module="echo", select=select)["id"] for _ in range(3)]
    ids.append(post(world, "/restarts", select=select)["id"])
    first = world.ask("GET", "/jobs", params={"limit": 2})
    assert [each["id"] for each in first["orders"]] == ids[:1:-1]
    assert first["orders"][0]["rows"] == []
    second = world.ask("GET", "/jobs", params={"limit": 2, "before": first["next"]})
    assert [each["id"] for each in second["orders"]] == ids[1::-1]
    restarts = world.ask("GET", "/jobs", params={"limit": 1, "kind": "command"})
    assert restarts["orders"][0]["id"] == ids[3]


async def test_events_show_every_change_and_end(world: World) -> None:
    group = f"g{os.urandom(3).hex()}"
    nodes = [await asyncio.to_thread(world.new_node, group) for _ in range(2)]
    ordered = await asyncio.to_thread(post, world, module="echo", select={"group": group}, args={"a": 1})

    def read(into: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with world.api() as api, api.stream("GET", f"/jobs/{ordered['id']}/events") as stream:
            into.extend(json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))
        return into

    seen: list[dict[str, Any]] = []
    reading = asyncio.create_task(asyncio.to_thread(read, seen))
    await eventually(lambda: len(seen) == len(nodes))  # how each row is now
    for node in nodes:
        async with node.connected() as channel:
            job = await channel.job()
            await channel.send("output", id=job["id"], seq=1, kind="progress", text="half", fraction=0.5)
            ok = node is nodes[0]
            await channel.answer(
                job, ok=ok, reply={"big": "x" * (10 if ok else 9000)}, code="" if ok else "memory"
            )
    await asyncio.wait_for(reading, 60)
    assert seen[-1] == {"kind": "end"}
    for node, state in zip(nodes, ("done", "failed"), strict=True):
        mine = [event for event in seen if event.get("node") == node.id]
        assert [event.get("state", event["kind"]) for event in mine] == [
            "queued", "taken", "running", "output", state,
        ]  # fmt: skip
        assert (mine[3]["what"], mine[3]["text"], mine[3]["fraction"]) == ("progress", "half", 0.5)
        assert [event["ended"] for event in mine if event["kind"] == "row"] == [False, False, False, True]
    done, failed = (next(e for e in seen if e.get("state") == state) for state in ("done", "failed"))
    assert done["reply"] == {"big": "x" * 10}
    assert (failed["reply"], failed["code"]) == (None, "memory")
    again = await asyncio.to_thread(read, [])  # after the end: how it is, and the end
    assert [(event["kind"], event.get("state")) for event in again] == [
        *sorted(
            (("row", "done"), ("row", "failed")),
            key=lambda e: (e[1] == "done") != (nodes[0].id < nodes[1].id),
        ),
        ("end", None),
    ]


def test_wishes_for_modules(world: World, node: Node) -> None:
    body = {"scope": "node", "subject": node.id, "version": "1.1.0"}
    for lines, change, code in (
        (["module/echo"], {"version": "1.2.0"}, "not-a-service"),
        (["module/inventory"], {"version": "7.0.0"}, "unknown-module"),
        (["module/nothing"], {}, "unknown-module"),
    ):
        refused = world.ask("PUT", "/wishes", 400, json={**body, "lines": lines, **change})
        assert refused["error"]["code"] == code
    world.ask("PUT", "/wishes", 422, json={**body, "lines": ["module/Bad Name"]})
    made = world.ask("PUT", "/wishes", json={**body, "lines": ["module/inventory", "agent"]})["wishes"]
    assert [(wish["line"], wish["target"].partition("/")[0]) for wish in made] == [
        ("module/inventory", "module"), ("agent", "node"),
    ]  # fmt: skip
    assert set(world.node(node.id)["wanted"]) == {"module/inventory", "agent"}
    gone = {"scope": "node", "subject": node.id, "line": "module/inventory"}
    world.ask("DELETE", "/wishes", params=gone)
    assert set(world.node(node.id)["wanted"]) == {"agent"}
    assert world.ask("DELETE", "/wishes", 404, params=gone)["error"]["code"] == "no-wish"


def test_old_orders_are_forgotten_when_they_have_ended(world: World) -> None:
    """By the rule itself, on a copy of the database's schema with orders of every age."""
    from instar_server.storage.database import Database
    from instar_server.storage.migrate import upgrade
    from instar_server.storage.orders import Orders

    path = world.folder / f"forget-{os.urandom(3).hex()}.db"
    upgrade(path)
    with sqlite3.connect(path) as database:
        database.execute("INSERT INTO groups VALUES ('g', 1)")
        database.execute(
            "INSERT INTO nodes (id, group_name, enrolled, enrol_key, token) VALUES ('n','g',1,'k','t')"
        )
        for name, made, due in (("old", 10, None), ("open", 10, 50.0), ("new", 1000, None)):
            database.execute(
                "INSERT INTO orders VALUES (?,'job','m','','','','{}','{}',1,1,1,?,'x',NULL,'')", (name, made)
            )
            values = (f"j-{name}", name, due)
            database.execute(
                "INSERT INTO order_jobs (id, order_id, node, state, due_at) VALUES (?,?,'n','done',?)", values
            )

    async def forget() -> int:
        database = Database(path)
        try:
            return await database.write_at_once(lambda connection: Orders(connection).forget(500.0))
        finally:
            await database.close()

    assert asyncio.run(forget()) == 1
    with sqlite3.connect(path) as database:
        assert {row[0] for row in database.execute("SELECT id FROM orders")} == {"open", "new"}
        assert {row[0] for row in database.execute("SELECT id FROM order_jobs")} == {"j-open", "j-new"}
