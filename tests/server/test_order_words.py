"""Whose word about an order counts, what a server that ends keeps, commands, modules that are wanted, waking."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.orders import heard, order, row, show, until
from tests.server.test_channel import alive, eventually
from tests.server.world import WITHIN_S, Channel, Node, World, running

# ---- whose word counts


async def test_another_nodes_word_counts_for_nothing(quick: World, channel: Channel) -> None:
    other = await asyncio.to_thread(quick.new_node)
    ordered = await order(quick, channel.node)
    job = await channel.read_type("job")
    async with other.connected() as stranger:
        await stranger.send("taken", id=job["id"])
        await stranger.send("output", id=job["id"], seq=1, kind="log", text="lies")
        await stranger.send("result", id=job["id"], ok=True, reply={"lies": True})
        assert (await stranger.read_type("error"))["code"] == "unknown-job"
        assert (await stranger.read_type("ack"))["id"] == job["id"]
        status = {"type": "restart-agent", "status": "success"}
        await stranger.send("command-status", id=job["id"], **status)
        assert (await stranger.read_type("error"))["code"] == "unknown-command"
        assert (await stranger.read_type("ack"))["id"] == job["id"]
        await asyncio.sleep(0.4)
    told = await row(quick, ordered)
    assert (told["state"], told["ok"], told["output"]) == ("sent", None, "")
    await channel.send("taken", id=job["id"])
    await until(quick, ordered, "taken")


async def test_words_about_nothing_are_dropped(channel: Channel) -> None:
    for id_ in ("", "j-nobody", "x" * 50_000):
        await channel.send("taken", id=id_)
        await channel.send("output", id=id_, seq=1, kind="log", text="x" * 1000)
        await channel.send("command-status", id=id_, type="x", status="in-progress")
    await channel.send("command-status", id="c-1", type="x", status="dancing")
    assert (await channel.read_type("error"))["code"] == "bad-status"
    await channel.send("ping", n=3)
    assert (await channel.read_type("pong"))["n"] == 3


async def test_the_first_of_two_results_counts(quick: World, channel: Channel) -> None:
    ordered = await order(quick, channel.node)
    job = await channel.job()
    for n in range(5):
        await channel.send("result", id=job["id"], ok=True, reply={"n": n})
    for _ in range(5):
        assert (await channel.read_type("ack"))["id"] == job["id"]
    assert (await row(quick, ordered))["reply"] == {"n": 0}


async def test_the_nodes_of_an_order_are_settled_when_it_is_made(quick: World) -> None:
    first = await asyncio.to_thread(quick.new_node, "settled")
    ordered = await asyncio.to_thread(
        quick.ask, "POST", "/jobs", json={"module": "echo", "select": {"group": "settled"}}
    )
    later = await asyncio.to_thread(quick.new_node, "settled")
    await asyncio.to_thread(quick.ask, "POST", "/groups", json={"name": "left"})
    await asyncio.to_thread(quick.ask, "PUT", f"/nodes/{first.id}/group", json={"group": "left"})
    async with later.connected() as channel:
        with pytest.raises(TimeoutError):
            await channel.read(0.7)
    found = await show(quick, ordered)
    assert ([each["node"] for each in found["rows"]], found["nodes"]) == ([first.id], 1)


# ---- the server's own end


@pytest.fixture
def own(tmp_path: Path) -> Iterator[World]:
    """A server that the test may end."""
    with running(tmp_path, job_resend_s=0.4, job_silence_s=0.6) as world:
        world.publish_module("echo")
        yield world


async def test_a_server_that_is_killed_loses_no_order(own: World) -> None:
    """Killed with jobs queued, sent and taken (and that not written yet): each of them ends, once."""
    node, away = [await asyncio.to_thread(own.new_node) for _ in range(2)]
    async with node.connected() as channel:
        ordered = [await order(own, node, args={"n": n}) for n in range(3)]
        queued = await order(own, away)
        jobs: list[dict[str, Any]] = []
        while len(jobs) < 3:  # some may come again meanwhile
            job = await channel.read_type("job")
            jobs += [job] if channel.jobs[job["id"]] == 1 else []
        await channel.answer(jobs[2])
        await channel.send("taken", id=jobs[1]["id"])
        await heard(channel)
        own.kill()
    own.start()
    assert (await row(own, ordered[2]))["reply"] == {"echo": {"n": 2}}
    async with node.connected() as channel:
        assert (await channel.read_type("job"))["id"] == jobs[0]["id"]
        acks = set()
        for each in jobs[1::-1]:
            await channel.send("result", id=each["id"], ok=True)
        while len(acks) < 2:
            frame = await channel.read()
            if frame["t"] == "ack":
                acks.add(frame["id"])
            else:  # the other one too, unless it was written that it is taken
                assert (frame["t"], frame["id"] in (jobs[0]["id"], jobs[1]["id"])) == ("job", True), frame
    async with away.connected() as channel:
        await channel.answer(await channel.job())
    for each in (*ordered, queued):
        assert (await row(own, each))["state"] == "done"
    assert own.stop() == 0


async def test_a_server_that_stops_answers_who_waits(own: World) -> None:
    node = await asyncio.to_thread(own.new_node)
    waiting = asyncio.create_task(order(own, node, wait_s=50))
    await asyncio.sleep(0.5)
    began = time.monotonic()
    stopping = asyncio.create_task(asyncio.to_thread(own.stop))
    with contextlib.suppress(Exception):  # an answer, or a connection that has ended: but soon
        assert (await waiting)["states"] == {"queued": 1}
    assert await stopping == 0
    assert time.monotonic() - began < 45


# ---- commands


async def test_a_restart_and_its_history(quick: World, channel: Channel) -> None:
    node = channel.node
    body = {"agent": True, "modules": ["inventory"], "within_s": 12, "wait_s": 50}
    waiting = asyncio.create_task(order(quick, node, path="/restarts", **body))
    command = await channel.read_type("command")
    assert command["origin"].startswith("server:")
    assert {name: command[name] for name in ("type", "modules", "args", "within_s")} == {
        "type": "restart-agent", "modules": ["inventory"], "args": {}, "within_s": 12,
    }  # fmt: skip
    await channel.send("taken", id=command["id"])
    told = {"id": command["id"], "type": "restart-agent"}
    await channel.send("command-status", **told, status="in-progress")
    await eventually(lambda: quick.ask("GET", "/jobs?limit=1")["orders"][0]["states"] == {"running": 1})
    status = {
        "status": "success",
        "text": "all run",
        "modules": {"inventory": "running"},
        "origin": "server:x",
        "asked": 1000.0,
        "ended": 1000.75,
    }
    await channel.send("command-status", **told, **status)
    assert (await channel.read_type("ack"))["id"] == command["id"]
    done = await waiting
    assert (done["kind"], done["name"], done["states"]) == ("command", "restart-agent", {"done": 1})
    assert done["rows"][0]["reply"]["modules"] == {"inventory": "running"}
    assert done["rows"][0]["seconds"] == 0.75
    entries = await asyncio.to_thread(quick.history, node.id)
    assert [entry["phase"] for entry in entries[:2]] == ["restarted", "restart-asked"]
    assert all(done["id"] in entry["reason_text"] for entry in entries[:2])
    assert all(done["made_by"] in entry["reason_text"] for entry in entries[:2])
    assert (await asyncio.to_thread(quick.ask, "GET", f"/nodes/{node.id}/history"))["whole"] is True


async def test_a_restart_that_fails_says_why(quick: World, channel: Channel) -> None:
    ordered = await order(quick, channel.node, path="/restarts", modules=["inventory"])
    command = await channel.read_type("command")
    assert command["type"] == "restart-module"
    told = {"id": command["id"], "type": "restart-module", "status": "timeout", "text": "killed after 30 s"}
    await channel.send("command-status", **told)
    await channel.read_type("ack")
    seen = await row(quick, ordered)
    assert (seen["state"], seen["code"], seen["text"]) == ("failed", "timeout", "killed after 30 s")
    assert (await asyncio.to_thread(quick.history, channel.node.id))[0]["phase"] == "restart-failed"


async def test_a_restart_that_was_asked_for_on_the_node_stands_in_its_history(channel: Channel) -> None:
    told = {
        "id": "c-0123",
        "type": "restart-module",
        "origin": "local:0",
        "status": "success",
        "text": "done",
    }
    await channel.send("command-status", **told | {"status": "in-progress"})
    for _ in range(2):  # again when the first ack was lost
        await channel.send("command-status", **told)
        assert (await channel.read_type("ack"))["id"] == "c-0123"
    entries = await asyncio.to_thread(channel.node.world.history, channel.node.id)
    assert [entry["phase"] for entry in entries] == ["restarted", "enrolled"]
    assert "local:0" in entries[0]["reason_text"]


# ---- modules that are wanted


def digest(world: World, version: str) -> str:
    return world.operator.modules["inventory", version].digest


async def verdict(node: Node, wanted: str, wait_s: float = 0, phase: str = "trial") -> Any:
    query = {"line": "module/inventory", "phase": phase, "tx": "t", "digest": wanted, "wait_s": wait_s}

    def ask() -> Any:
        with node.http() as http:
            return http.get("/v1/node/verdict", params=query).json()

    return await asyncio.to_thread(ask)


async def test_a_wish_for_a_module_is_told_nudged_and_judged(quick: World, channel: Channel) -> None:
    node, line = channel.node, "module/inventory"
    await asyncio.to_thread(quick.want, "node", node.id, "1.0.0", line)
    assert line in (await channel.read_type("look"))["reason"]
    with node.http() as http:
        told = (await asyncio.to_thread(http.get, "/v1/node/wanted")).json()["lines"]
    wanted = digest(quick, "1.0.0")
    assert (told[line]["digest"], told[line]["target"]) == (wanted, "module/inventory-1.0.0.tar.gz")
    assert (await verdict(node, wanted))["reason"]["code"] == "other-module"
    waiting = asyncio.create_task(verdict(node, wanted, 20))
    await asyncio.sleep(0.3)
    await channel.send("health", ok=True, modules={"inventory": "starting"}, digests={"inventory": wanted})
    assert await alive(channel)  # it has been heard
    assert not waiting.done()
    assert (await verdict(node, wanted))["reason"]["code"] == "module-not-ok"
    await channel.send("health", ok=True, modules={"inventory": "ok"}, digests={"inventory": wanted})
    assert (await waiting)["verdict"] == "pass"
    assert (await verdict(node, "f" * 96))["verdict"] == "wait"
    assert (await verdict(node, wanted, phase="rehearsal"))["error"]["code"] == "bad-phase"
    await eventually(
        lambda: quick.node(node.id)["modules"] == {"inventory": {"state": "ok", "digest": wanted}}
    )
    gone = {"scope": "node", "subject": node.id, "line": line}
    await asyncio.to_thread(quick.ask, "DELETE", "/wishes", params=gone)
    assert "wanted no more" in (await channel.read_type("look"))["reason"]
    phases = [entry["phase"] for entry in await asyncio.to_thread(quick.history, node.id)]
    assert phases == ["unwanted", "wanted", "enrolled"]
    await channel.ws.close()
    await eventually(lambda: quick.node(node.id)["state"] == "offline")
    assert (await verdict(node, wanted))["reason"]["code"] == "not-connected"


async def test_events_of_module_lines_are_stored(quick: World, node: Node) -> None:
    event = {
        "id": "t1:1", "tx": "t1", "line": "module/file.integrity", "phase": "trial", "version": "1.0.0",
        "digest": "a" * 96, "wall": 1.0,
    }  # fmt: skip
    lines = {"module/" + "x" * 32: 400, "module/": 400, "module/Up": 400, event["line"]: 200}
    with node.http() as http:
        for line, status in lines.items():
            body = {"v": 1, "events": [event | {"line": line}]}
            assert (await asyncio.to_thread(http.post, "/v1/node/events", json=body)).status_code == status
    assert (await asyncio.to_thread(quick.node, node.id))["transaction"]["line"] == event["line"]


# ---- waking


async def test_the_server_knocks_at_a_nodes_wake_port(quick: World, node: Node) -> None:
    knocks = asyncio.Queue[bytes]()

    async def knocked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        knocks.put_nowait(await reader.read())
        writer.close()

    refused = await asyncio.to_thread(quick.ask, "POST", f"/nodes/{node.id}/poke", 409)
    assert refused["error"]["code"] == "no-wake-port"
    async with await asyncio.start_server(knocked, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        async with node.channel() as channel:
            await channel.hello(wake_port=port)
            await channel.read_type("welcome")
        await eventually(lambda: quick.node(node.id)["wake_port"] == port)
        assert (await asyncio.to_thread(quick.node, node.id))["address"] == "127.0.0.1"
        done = await asyncio.to_thread(quick.ask, "POST", f"/nodes/{node.id}/poke")
        assert done == {"address": "127.0.0.1", "port": port}
        assert await asyncio.wait_for(knocks.get(), WITHIN_S) == b""
    with socket.socket() as deaf:  # nobody else may listen here
        deaf.bind(("127.0.0.1", 0))
        port = deaf.getsockname()[1]
        async with node.channel() as channel:
            await channel.hello(wake_port=port)
            await channel.read_type("welcome")
            await eventually(lambda: quick.node(node.id)["wake_port"] == port)
        silent = await asyncio.to_thread(quick.ask, "POST", f"/nodes/{node.id}/poke", 503)
        assert silent["error"]["code"] == "no-answer"
    async with node.channel() as channel:
        await channel.hello(wake_port=70_000)
        assert (await channel.read_type("refused"))["code"] == "bad-hello"
