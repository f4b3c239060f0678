"""When the server says pass, fail or wait; and what the nodes are told is wanted."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import httpx
import pytest

from tests.server.world import WITHIN_S, Node, World


def digest(world: World, version: str) -> str:
    return str(world.operator.releases[version].custom["program_digest"])


async def ask(
    node: Node, phase: str, tx: str, digest: str, line: str = "agent", wait_s: float = 0, program: str = ""
) -> Any:
    def get() -> httpx.Response:
        with node.http(program) as http:
            query = {"line": line, "phase": phase, "tx": tx, "digest": digest, "wait_s": wait_s}
            return http.get("/v1/node/verdict", params=query)

    answer = await asyncio.to_thread(get)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def rehearse(node: Node, tx: str, version: str = "1.1.0", /, **wrong: Any) -> None:
    async with node.connected(version, "rehearsal", tx) as channel:
        job = await channel.read()
        assert (job["t"], job["purpose"], job["module"]) == ("job", "rehearsal", "selftest")
        await channel.selftest(job, version, **wrong)
        assert await channel.read() == {"t": "ack", "id": job["id"]}
        assert (await channel.read())["code"] == "rehearsal-over"
        assert (await channel.read())["t"] == "closed"


@pytest.fixture
async def node(world: World) -> Node:
    return await asyncio.to_thread(world.new_node)


async def test_a_right_reply_passes_the_rehearsal_and_wakes_who_waits(world: World, node: Node) -> None:
    started = time.monotonic()
    waiting = asyncio.create_task(ask(node, "rehearsal", "t1", digest(world, "1.1.0"), wait_s=20))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await rehearse(node, "t1")
    assert (await waiting)["verdict"] == "pass"
    assert time.monotonic() - started < 18  # it was woken
    assert (await asyncio.to_thread(world.node, node.id))["state"] != "connected"


@pytest.mark.parametrize(
    ("field", "value"),
    [("answer", "0" * 64), ("nonce", "0" * 32), ("version", "1.0.0"), ("digest", "0" * 96)],
)
async def test_a_wrong_reply_fails_the_rehearsal(world: World, node: Node, field: str, value: str) -> None:
    await rehearse(node, "t2", **{field: value})
    verdict = await ask(node, "rehearsal", "t2", digest(world, "1.1.0"))
    assert (verdict["verdict"], verdict["reason"]["code"]) == ("fail", f"wrong-{field}")


async def test_a_failed_job_fails_the_rehearsal(world: World, node: Node) -> None:
    async with node.connected("1.1.0", "rehearsal", "t3") as channel:
        job = await channel.read()
        await channel.send("result", id=job["id"], ok=False, reason="signal 11", signal=11)
        assert (await channel.read())["t"] == "ack"
    verdict = await ask(node, "rehearsal", "t3", digest(world, "1.1.0"))
    assert (verdict["verdict"], verdict["reason"]["code"]) == ("fail", "job-failed")
    assert "signal 11" in verdict["reason"]["text"]


async def test_no_reply_fails_and_a_cut_decides_nothing(world: World, node: Node) -> None:
    async with node.connected("1.1.0", "rehearsal", "t4"):
        pass
    assert (await ask(node, "rehearsal", "t4", digest(world, "1.1.0")))["verdict"] == "wait"
    async with node.connected("1.1.0", "rehearsal", "t4") as channel:
        assert (await channel.read())["t"] == "job"
        assert (await channel.read())["code"] == "rehearsal-over"
    verdict = await ask(node, "rehearsal", "t4", digest(world, "1.1.0"))
    assert (verdict["verdict"], verdict["reason"]["code"]) == ("fail", "no-reply")


async def test_a_release_that_was_never_published_fails(node: Node) -> None:
    async with node.connected("1.1.0", "rehearsal", "t5", digest="f" * 96) as channel:
        assert (await channel.read())["code"] == "rehearsal-over"
    verdict = await ask(node, "rehearsal", "t5", "f" * 96)
    assert (verdict["verdict"], verdict["reason"]["code"]) == ("fail", "unknown-release")


async def test_a_rehearsal_of_another_program_is_no_pass(world: World, node: Node) -> None:
    await rehearse(node, "t6", "1.0.0")
    verdict = await ask(node, "rehearsal", "t6", digest(world, "1.1.0"))
    assert (verdict["verdict"], verdict["reason"]["code"]) == ("fail", "other-program")


async def test_a_rehearsal_of_another_node_counts_for_nobody_else(world: World, node: Node) -> None:
    other = await asyncio.to_thread(world.new_node)
    await rehearse(other, "t7")
    assert (await ask(node, "rehearsal", "t7", digest(world, "1.1.0")))["verdict"] == "wait"


async def test_the_trial_passes_while_the_new_agent_is_up(world: World, node: Node) -> None:
    wanted = digest(world, "1.1.0")
    assert (await ask(node, "trial", "t8", wanted))["reason"]["code"] == "not-connected"
    waiting = asyncio.create_task(ask(node, "trial", "t8", wanted, wait_s=20))
    async with node.connected("1.1.0", tx="t8") as channel:
        job = await channel.read_type("job")
        assert job["purpose"] == "health"
        assert (await ask(node, "trial", "t8", wanted))["reason"]["code"] == "no-health-yet"
        await channel.selftest(job, "1.1.0")
        await channel.read_type("ack")
        assert (await waiting)["verdict"] == "pass"
        assert (await ask(node, "trial", "t8", wanted))["verdict"] == "pass"
        await channel.selftest(job, "1.1.0", answer="late lies")  # sent again: acknowledged, changes nothing
        await channel.read_type("ack")
        assert (await ask(node, "trial", "t8", wanted))["verdict"] == "pass"
    until = time.monotonic() + WITHIN_S
    while (found := await ask(node, "trial", "t8", wanted))["verdict"] == "pass":  # until its end is seen
        assert time.monotonic() < until
    assert found["reason"]["code"] == "not-connected"


async def test_the_trial_fails_on_a_wrong_reply_and_waits_for_an_old_agent(world: World, node: Node) -> None:
    async with node.connected("1.1.0", tx="t9") as channel:
        await channel.selftest(await channel.read_type("job"), "1.1.0", version="1.0.0")
        await channel.read_type("ack")
    assert (await ask(node, "trial", "t9", digest(world, "1.1.0")))["verdict"] == "fail"
    async with node.connected("1.0.0"):
        verdict = await ask(node, "trial", "t10", digest(world, "1.1.0"))
        assert (verdict["verdict"], verdict["reason"]["code"]) == ("wait", "other-agent")


async def test_the_trial_of_an_updater_needs_its_rehearsal_and_its_own_question(
    world: World, node: Node
) -> None:
    new, old = digest(world, "1.1.0"), digest(world, "1.0.0")
    await rehearse(node, "t11")
    by_old = await ask(node, "trial", "t11", new, "updater", program=f"updater 1.0.0 {old}")
    assert (by_old["verdict"], by_old["reason"]["code"]) == ("wait", "other-updater")
    assert (await ask(node, "trial", "t11", new, "updater"))["verdict"] == "wait"
    by_new = await ask(node, "trial", "t11", new, "updater", program=f"updater 1.1.0 {new}")
    assert by_new["verdict"] == "pass"
    seen = await asyncio.to_thread(world.node, node.id)
    assert seen["updater"] == {"version": "1.1.0", "digest": new}


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({"line": "x"}, "bad-line"), ({"phase": "x"}, "bad-phase"), ({"tx": ""}, "bad-tx"),
        ({"digest": "x"}, "bad-digest"), ({"wait_s": "nan"}, "bad-wait"), ({"wait_s": "-1"}, "bad-wait"),
    ],
)  # fmt: skip
async def test_a_bad_question_is_named(node: Node, query: dict[str, str], code: str) -> None:
    good = {"line": "agent", "phase": "trial", "tx": "t", "digest": "0" * 96}
    with node.http() as http:
        answer = await asyncio.to_thread(http.get, "/v1/node/verdict", params={**good, **query})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def test_a_bad_program_header_is_named(world: World) -> None:
    with world.new_node().http("agent 1.0.0") as http:
        answer = http.get("/v1/node/wanted")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad-program-header")


# ---- wishes


def lines(node: Node) -> dict[str, Any]:
    with node.http() as http:
        found: dict[str, Any] = http.get("/v1/node/wanted").json()["lines"]
    return found


def test_a_nodes_own_wish_goes_before_its_groups_and_generations_never_go_back(world: World) -> None:
    group = f"g{os.urandom(3).hex()}"
    node, other = world.new_node(group), world.new_node(group)
    assert lines(node) == {}
    world.want("group", group, "1.0.0")
    first = lines(node)
    assert list(first) == ["agent"]
    assert first["agent"] == {
        "version": "1.0.0",
        "target": "node/instar-1.0.0.tar.gz",
        "digest": digest(world, "1.0.0"),
        "generation": first["agent"]["generation"],
    }
    world.want("node", node.id, "1.1.0")
    assert lines(node)["agent"]["version"] == "1.1.0"
    assert lines(other) == first
    second = lines(node)["agent"]["generation"]
    with world.api() as api:
        query = {"scope": "node", "subject": node.id, "line": "agent"}
        assert api.delete("/wishes", params=query).status_code == 200
        assert api.delete("/wishes", params=query).status_code == 404
    back = lines(node)["agent"]
    assert back["version"] == "1.0.0"
    assert back["generation"] > second > first["agent"]["generation"]
    world.want("group", group, "1.0.0")
    assert lines(node)["agent"]["generation"] > back["generation"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"version": "9.9.9"}, 400, "unknown-release"),
        ({"subject": "nobody"}, 404, "unknown-group"),
        ({"scope": "node", "subject": "n-" + "0" * 16}, 404, "unknown-node"),
        ({"lines": ["kernel"]}, 422, "bad-request"),
        ({"lines": []}, 422, "bad-request"),
        ({"extra": 1}, 422, "bad-request"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(
    world: World, body: dict[str, Any], status: int, code: str
) -> None:
    world.new_node()
    good = {"scope": "group", "subject": "default", "lines": ["agent"], "version": "1.0.0"}
    with world.api() as api:
        answer = api.put("/wishes", json={**good, **body})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_a_wish_sends_a_look_to_who_needs_it_once(world: World) -> None:
    group = f"g{os.urandom(3).hex()}"
    node = await asyncio.to_thread(world.new_node, group)
    async with node.connected("1.0.0") as channel:
        await asyncio.to_thread(world.want, "group", group, "1.0.0")
        await asyncio.to_thread(world.want, "group", group, "1.1.0")
        look = await channel.read_type("look")
        assert "1.1.0" in look["reason"]
        with pytest.raises(TimeoutError):
            await channel.read(1.0)
