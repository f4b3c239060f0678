"""What nodes say of their systems, who hears of it, what is said to them; and what outlives the server."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import systems
from tests.server.systems import at_work, eventually, new_node, order, report, say, slot, tell, view, wanted
from tests.server.test_channel import alive
from tests.server.world import Node, World, running


@pytest.fixture
def node(fleet: World) -> Node:
    return new_node(fleet)


# ---- what a node reports


def test_a_report_is_shown(fleet: World) -> None:
    node = fleet.new_node()
    nothing = view(fleet, node)
    assert (nothing["told"], nothing["running"], nothing["slots"], nothing["update"]) == (None, "", {}, None)
    boot = {"order": ["b", "a"], "once": "a", "tries": {"a": 2}, "drift": ["an entry of ours was gone"]}
    tell(node, running="b", backend="counting", boot=boot)
    shown = view(fleet, node)
    assert shown["told"] > time.time() - 60
    assert (shown["running"], shown["backend"], shown["boot"]) == ("b", "counting", boot)
    assert shown["slots"] == report()["slots"]
    assert (shown["hardware"], shown["arch"]) == (["board-7", "virtual"], "x86_64")


def test_bytes_are_shown_and_kept(fleet: World, node: Node) -> None:
    made = order(fleet, node)
    tell(node, update=at_work("t", made["generation"]))
    shown = view(fleet, node)
    (row,) = shown["updates"]
    assert (row["done"], row["total"], row["fetched"], row["reused"], row["slot"]) == (
        100_000, 300_000, 60_000, 40_000, "b",
    )  # fmt: skip
    assert shown["update"]["step"] == "stage"
    tell(node, update=at_work("t", made["generation"], "verify", done=10, fetched=0, reused=0))
    time.sleep(1.5)
    say(node, "t", made["generation"], "trial", "confirmed")
    shown = view(fleet, node)
    assert shown["update"] is None  # its report is older than its end
    (row,) = shown["updates"]
    assert (row["total"], row["fetched"], row["reused"]) == (300_000, 60_000, 40_000)


def _with(path: str, value: Any) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(json.dumps(report(update=at_work("t", 1))))
    at = body
    *parents, last = path.split(".")
    for part in parents:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return body


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("v", 2), ("v", ...), ("running", ...), ("running", "c"), ("running", None), ("slots", ...), ("slots", []),
        ("slots.c", slot()), ("slots.a", []), ("slots.a.state", 5), ("slots.a.state", "No State"),
        ("slots.a.version", "x" * 65), ("slots.a.digest", "x"), ("slots.a.digest", "a" * 97),
        ("slots.a.size", -1), ("slots.a.size", 1 << 60), ("slots.a.size", 1.5), ("slots.a.done", "1"),
        ("slots.a.since", -1), ("slots.a.since", 1e300), ("slots.a.why", "x" * 16_385),
        ("slots.a.booted_by", "magic"), ("slots.a.cold_boot_seen", 1), ("hardware", ["x"] * 17),
        ("hardware", ["x" * 129]), ("hardware", "board-7"), ("arch", "x" * 65), ("backend", "grub"),
        ("boot.order", ["c"]), ("boot.order", ["a"] * 9), ("boot.once", "c"), ("boot.tries", {"c": 1}),
        ("boot.tries", {"a": -1}), ("boot.drift", ["x"] * 17), ("boot.drift", ["x" * 501]), ("boot", None),
        ("update.tx", ""), ("update.tx", "a b"), ("update.tx", ...), ("update.generation", -1),
        ("update.generation", True), ("update.step", "No Step"), ("update.slot", "c"), ("update.done", -1),
        ("update.total", 1 << 60), ("update.fetched", "1"), ("error", "x"),
        ("error", {}),
        ("error", {"code": "x" * 65}),
        ("update", []), ("update", "t"),
    ],
)  # fmt: skip
def test_a_hostile_report_stores_nothing(fleet: World, node: Node, path: str, value: Any) -> None:
    before = view(fleet, node)
    answer = tell(node, _with(path, value))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad-body"), path
    assert view(fleet, node) == before


def test_reports_are_bounded_as_a_whole(fleet: World, node: Node) -> None:
    before = view(fleet, node)
    with node.http() as http:
        raw = [b"", b"{", b"[]", b"\xff", b'{"v":1,"running":"\\ud800"}', b"[" * 100_000]
        for body in raw:
            answer = http.post("/v1/node/system", content=body)
            assert (answer.status_code, answer.json()["error"]["code"]) in (
                (400, "bad-body"),
                (413, "body-too-large"),
            )
        answer = http.post("/v1/node/system", json=report(padding="x" * 70_000))
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body-too-large")
        # Each part within its bound, and too much together.
        long = [chr(0x1F600) * 500] * 16
        answer = http.post("/v1/node/system", json=report(boot={"drift": long}))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "report-too-large")
        with httpx.Client(base_url=node.base, verify=False, trust_env=False, timeout=60) as stranger:
            assert stranger.post("/v1/node/system", json=report()).status_code == 401
    assert view(fleet, node) == before
    assert (
        tell(node, padding="x" * 100, slots={"a": slot(new_field=1), "b": slot(why="x" * 16_000)}).status_code
        == 200
    )
    assert (
        len(view(fleet, node)["slots"]["b"]["why"]) == 2000
    )  # what is not known is passed over, a text is cut


# ---- those who watch


async def test_those_who_watch_see_it_go(fleet: World) -> None:
    node = await asyncio.to_thread(new_node, fleet)
    seen: list[dict[str, Any]] = []
    changes: list[str] = []

    def watch() -> None:
        path = f"/nodes/{node.id}/system/events"
        with fleet.api() as api, api.stream("GET", path, params={"for_s": 60}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    seen.append(json.loads(line.removeprefix("data: ")))
                    if seen[-1]["updates"] and seen[-1]["updates"][0]["state"] == "confirmed":
                        return

    def stream() -> None:
        with fleet.api() as api, api.stream("GET", "/stream", params={"for_s": 60}) as lines:
            for line in lines.iter_lines():
                if node.id in line or line == ": connected":
                    changes.append(line)
                if '"state": "open"' in line and node.id in line:
                    return

    watching = [asyncio.create_task(asyncio.to_thread(each)) for each in (watch, stream)]
    await eventually(lambda: bool(seen) and bool(changes))
    made = await asyncio.to_thread(order, fleet, node)
    await asyncio.to_thread(tell, node, update=at_work("t", made["generation"]))
    await eventually(lambda: any(each["update"] for each in seen))
    await asyncio.to_thread(say, node, "t", made["generation"], "offered", "trial", "confirmed")
    await asyncio.gather(*watching)
    states = [each["updates"][0]["phase"] if each["updates"] else "none" for each in seen]
    assert [state for n, state in enumerate(states) if state not in states[:n]] == ["none", "", "confirmed"]
    assert all(each["kind"] == "system" for each in seen)
    assert any('"kind": "system-update"' in line for line in changes)


async def test_the_node_is_told_to_look_at_once_and_when_it_connects(fleet: World) -> None:
    node = await asyncio.to_thread(new_node, fleet)
    async with node.connected() as channel:
        await asyncio.to_thread(order, fleet, node)
        assert "1.1.0" in (await channel.read_type("look"))["reason"]
    async with node.connected() as channel:
        assert "system" in (await channel.read_type("look"))["reason"]
    await asyncio.to_thread(fleet.ask, "DELETE", f"/nodes/{node.id}/update-os")
    await asyncio.to_thread(wanted, node)
    async with node.connected() as channel:
        with pytest.raises(TimeoutError):
            await channel.read(0.5)


# ---- the verdict


async def ask(node: Node, wait_s: float = 0, status: int = 200, **query: str) -> Any:
    asked = {"line": "os", "phase": "trial", "tx": "t", "digest": "0" * 96, "boot_id": "now"}
    asked |= {"wait_s": f"{wait_s:g}", **query}

    def get() -> httpx.Response:
        with node.http() as http:
            return http.get("/v1/node/verdict", params=asked)

    answer = await asyncio.to_thread(get)
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_the_verdict_on_a_system_is_about_the_boot_that_runs(fleet: World) -> None:
    node = await asyncio.to_thread(new_node, fleet)
    assert (await ask(node))["reason"]["code"] == "not-connected"
    async with node.channel() as channel:
        await channel.hello(boot_id="before")
        await channel.read_type("welcome")
        await channel.send("health", ok=True)
        assert await alive(channel)  # it has been heard
        assert (await ask(node, boot_id="before"))["verdict"] == "pass"
        assert (await ask(node))["reason"]["code"] == "other-boot"
    async with node.channel() as channel:
        await channel.hello(boot_id="now")
        await channel.read_type("welcome")
        assert (await ask(node))["reason"][
            "code"
        ] == "no-health-yet"  # the one from before counts for nothing
        await channel.send("health", ok=False)
        assert await alive(channel)
        assert (await ask(node))["reason"]["code"] == "not-well"
        at = time.monotonic()
        waiting = asyncio.create_task(ask(node, 20))
        await asyncio.sleep(0.2)
        await channel.send("health", ok=True)
        assert (await waiting)["verdict"] == "pass"
        assert time.monotonic() - at < 18.0  # it was woken
    while (found := await ask(node))["verdict"] == "pass":  # until the server has seen the end of the channel
        assert time.monotonic() - at < 60.0
    assert found["reason"]["code"] == "not-connected"


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({"boot_id": ""}, "bad-boot-id"), ({"boot_id": "x" * 65}, "bad-boot-id"), ({"boot_id": "a\nb"}, "bad-boot-id"),
        ({"phase": "rehearsal"}, "bad-phase"), ({"digest": "x"}, "bad-digest"), ({"tx": ""}, "bad-tx"),
    ],
)  # fmt: skip
async def test_a_bad_question_is_named(fleet: World, query: dict[str, str], code: str) -> None:
    node = await asyncio.to_thread(fleet.new_node)
    assert (await ask(node, 0, 400, **query))["error"]["code"] == code


# ---- the server, killed and started again


def test_what_was_ordered_and_reported_outlives_the_server(tmp_path: Path) -> None:
    with running(tmp_path, artifacts_port=0, wrong_tokens=1000) as world:
        systems.publish(world, "1.1.0")
        node, other = new_node(world), new_node(world)
        made = order(world, node, activation="none")
        cold = world.ask("POST", f"/nodes/{other.id}/cold-boot", 202, json={"at": time.time() + 900})
        tell(node, update=at_work("t", made["generation"]))
        say(node, "t", made["generation"], "offered")
        assert world.stop() == 0
        world.start()
        assert wanted(node)["lines"]["os"]["generation"] == made["generation"]
        assert wanted(other)["cold_boot"]["generation"] == cold["generation"]
        shown = view(world, node)
        assert (shown["update"]["tx"], shown["updates"][0]["phase"]) == ("t", "offered")
        assert shown["updates"][0]["fetched"] == 60_000
        world.kill()
        world.start()
        assert made["id"] in order(world, node, 409)["error"]["message"]
        say(node, "t", made["generation"], "staged", "confirmed", first=2)
        assert view(world, node)["updates"][0]["outcome"] == "installed, not active"
        assert "Traceback" not in (world.folder / "server.log").read_text()


# ---- the bundle's bytes


@pytest.mark.parametrize("port", ["gateway", "artifacts"])
def test_a_bundle_is_fetched_in_ranges(tmp_path: Path, port: str) -> None:
    settings = {"artifacts_port": 0} if port == "artifacts" else {}
    with running(tmp_path, **settings) as world:
        release = systems.publish(world, "1.1.0", size=3_000_000)
        data, etag = release.archive, f'"{release.sha256}"'
        url = f"/v1/targets/os/{release.sha256}.web-1.1.0.bundle"
        node = world.new_node()
        base = f"https://127.0.0.1:{world.ports[f'{port}_port']}"
        with httpx.Client(base_url=base, verify=node.context(), trust_env=False, timeout=30) as http:
            for start, end in ((0, 14), (14, 5000), (1_000_000, 1_131_073), (len(data) - 1, len(data))):
                part = http.get(url, headers={"Range": f"bytes={start}-{end - 1}", "If-Range": etag})
                assert part.status_code == 206
                assert part.headers["Content-Range"] == f"bytes {start}-{end - 1}/{len(data)}"
                assert part.content == data[start:end]
            rest = http.get(url, headers={"Range": "bytes=2000000-"})
            assert (rest.status_code, rest.content) == (206, data[2_000_000:])
            assert http.get(url).content == data
            assert http.get(url, headers={"Range": f"bytes={len(data)}-"}).status_code == 416
        if port == "artifacts":
            with node.http() as http:
                assert http.get(url).status_code == 421


def test_the_listing_says_what_was_signed(fleet: World) -> None:
    found = fleet.ask("GET", "/releases")["bundles"]
    names = [(each["custom"]["name"], each["version"]) for each in found if each["version"] < "3"]
    assert names == [("other", "1.1.0"), ("web", "1.2.0"), ("web", "1.1.0")]
    signed = json.loads(fleet.operator.targets)["signed"]["targets"]
    for each in found:
        assert each["custom"] == signed[each["target"]]["custom"]
        assert each["digest"] == each["custom"]["digest"]
    assert not any(each["target"].startswith("os/") for each in fleet.ask("GET", "/releases")["releases"])
    assert os.path.basename(found[-1]["target"]) == "web-1.1.0.bundle"
