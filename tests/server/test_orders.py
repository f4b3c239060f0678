"""Orders over a real server and real channels: delivered at least once, ended for sure, cancelled."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.server.orders import hurry, order, row, settled, show, until
from tests.server.test_channel import eventually
from tests.server.world import Channel, Node, World

# ---- there and back


@pytest.fixture
async def patient(world: World) -> AsyncIterator[Channel]:
    """A node of a server that sends nothing again before 10 s have passed."""
    node = await asyncio.to_thread(world.new_node)
    async with node.connected() as found:
        yield found


async def test_a_job_goes_out_at_once_and_its_answer_comes_back(world: World, patient: Channel) -> None:
    channel = patient
    body = {"args": {"x": [1, None, "é"]}, "deadline_s": 7.5, "lapse_s": 1000, "wait_s": 50}
    waiting = asyncio.create_task(order(world, channel.node, **body))
    job = await channel.read_type("job")
    assert 900 < job.pop("lapse_s") <= 1000
    release = world.operator.modules["echo", "1.10.0"]  # the newest, not the last by letters
    assert job == {
        "t": "job", "id": job["id"], "module": "echo", "purpose": "job", "args": {"x": [1, None, "é"]},
        "deadline_s": 7.5, "version": "1.10.0", "digest": release.digest, "target": release.path,
    }  # fmt: skip
    await channel.send("taken", id=job["id"])
    for seq, text in enumerate(("one", "two"), start=1):
        await channel.send("output", id=job["id"], seq=seq, kind="log", text=text)
    result = {"reply": {"y": 2}, "exit_code": 0, "seconds": 0.25, "max_rss": 4096, "stderr": "hm"}
    assert not waiting.done()
    await channel.send("result", id=job["id"], ok=True, **result)
    assert await channel.read_type("ack") == {"t": "ack", "id": job["id"]}
    done = await waiting
    assert (done["states"], done["open"], done["nodes"]) == ({"done": 1}, 0, 1)
    told = done["rows"][0]
    assert {name: told[name] for name in result} == result
    assert (told["ok"], told["code"], told["output"]) == (True, "", "one\ntwo\n")
    assert told["sends"] == channel.jobs[job["id"]]
    assert told["sent_at"] <= told["ended_at"]
    await asyncio.sleep(0.5)  # marks are written: they must not take a row back
    assert await show(world, done) == done


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ({"code": "deadline", "reason": "30 s are over", "signal": 9}, "failed"),
        ({"code": "lapsed", "reason": "not begun"}, "lapsed"),
        ({"reason": "exit 3", "exit_code": 3}, "failed"),
    ],
)
async def test_a_job_that_fails_says_why(
    quick: World, channel: Channel, said: dict[str, Any], state: str
) -> None:
    waiting = asyncio.create_task(order(quick, channel.node, wait_s=50))
    job = await channel.job()
    await channel.answer(job, ok=False, reply={}, **said)
    ordered = await waiting
    told = await row(quick, ordered)
    assert ordered["rows"] == [told]
    assert (told["state"], told["ok"], told["code"]) == (state, False, said.get("code", "failed"))
    assert told["text"] == said["reason"]


async def test_a_node_that_is_off_gets_its_jobs_in_order_when_it_comes(quick: World, node: Node) -> None:
    ordered = [await order(quick, node, args={"n": n}, lapse_s=1000) for n in range(3)]
    assert [each["states"] for each in ordered] == [{"queued": 1}] * 3
    async with node.connected() as channel:
        jobs = [await channel.job() for _ in range(3)]
        assert [job["args"]["n"] for job in jobs] == [0, 1, 2]
        assert all(800 < job["lapse_s"] < 1000 for job in jobs)
        assert (await until(quick, ordered[0], "taken"))["taken_at"]
        for job in jobs:
            await channel.answer(job)
    assert [(await row(quick, each))["state"] for each in ordered] == ["done"] * 3


async def test_what_is_not_taken_is_sent_again_and_what_is_taken_is_not(
    quick: World, channel: Channel
) -> None:
    ordered = await order(quick, channel.node)
    first = await channel.read_type("job")
    while (again := await channel.read_type("job"))["lapse_s"] >= first["lapse_s"]:
        assert again["id"] == first["id"]  # ordered just as the node came, it may be sent for both reasons
    assert again["id"] == first["id"]
    await channel.send("taken", id=first["id"])
    told = await until(quick, ordered, "taken")
    assert told["sends"] >= 2
    await settled(quick, channel)
    with pytest.raises(TimeoutError):
        await channel.read(1.5)


async def test_a_node_that_is_late_with_its_result_is_asked(quick: World, channel: Channel) -> None:
    """deadline_s 0.3 and silence_s 0.6: asked after 0.9 s, by the same frame, again and again."""
    ordered = await order(quick, channel.node, deadline_s=0.3)
    job, began = await channel.read_type("job"), time.monotonic()
    await channel.send("taken", id=job["id"])
    await settled(quick, channel)
    for _ in range(3):  # the first may be late for its taking, all the same
        assert (await channel.read_type("job"))["id"] == job["id"]
        await channel.send("taken", id=job["id"])
    assert time.monotonic() - began > 1.5
    await channel.answer(job)
    assert (await row(quick, ordered))["state"] == "done"


async def test_a_hundred_results_after_an_absence(quick: World, node: Node) -> None:
    ordered = [await order(quick, node, args={"n": n}) for n in range(100)]
    async with node.connected() as channel:
        jobs = [await channel.job() for _ in range(100)]
    async with node.connected() as channel:
        for job in jobs:
            await channel.send("result", id=job["id"], ok=True, reply={"n": job["args"]["n"]})
        acks = set()
        while len(acks) < 100:
            frame = await channel.read()
            if frame["t"] == "ack":
                acks.add(frame["id"])
    assert acks == {job["id"] for job in jobs}
    for n in (0, 57, 99):
        assert (await row(quick, ordered[n]))["reply"] == {"n": n}


async def test_a_pile_of_jobs_comes_in_parts(quick: World, node: Node) -> None:
    """Not more than 256 are open at a node; the others follow when it has worked off half of them."""
    add_orders(quick, node, 300)
    async with node.connected() as channel:
        jobs = [await channel.job() for _ in range(256)]
        await settled(quick, channel)
        with pytest.raises(TimeoutError):
            await channel.read(0.5)
        await order(quick, node)  # newer than all that wait: it goes behind them
        with pytest.raises(TimeoutError):
            await channel.read(0.3)
        seen: list[str] = [job["id"] for job in jobs]
        while len(set(seen)) < 301 or jobs:
            if jobs:
                await channel.send("result", id=jobs.pop(0)["id"], ok=True)
            frame = await channel.read()
            if frame["t"] == "job" and frame["id"] not in seen:
                seen.append(frame["id"])
                jobs.append(frame)
                await channel.send("taken", id=frame["id"])
    assert len(set(seen)) == 301


def add_orders(world: World, node: Node, count: int) -> None:
    """Put orders for a node into the database, as many calls of the API would."""
    now = time.time()
    with sqlite3.connect(world.layout.database, timeout=60) as database:
        for n in range(count):
            id_ = f"{n:06x}{node.id[2:]}00"
            database.execute(
                "INSERT INTO orders VALUES (?,'job','selftest','','','','{}','{}',1,600,?,?,'x',NULL,'')",
                (f"o-{id_}", now + 900, now - 900 + n),
            )
            database.execute(
                "INSERT INTO order_jobs (id, order_id, node, state, due_at) VALUES (?,?,?,'queued',?)",
                (f"j-{id_}", f"o-{id_}", node.id, now + 900),
            )


async def test_a_node_without_room_is_asked_again(quick: World, channel: Channel) -> None:
    ordered = await order(quick, channel.node)
    first = await channel.read_type("job")
    why = "it holds 1000 jobs"
    await channel.answer(first, ok=False, reply={}, code="not-taken", reason=why)
    told = await row(quick, ordered)
    assert (told["state"], told["ok"], told["code"], told["text"]) == ("sent", None, "not-taken", why)
    again = await channel.job()
    assert again["id"] == first["id"]
    told = await until(quick, ordered, "taken")
    assert (told["code"], told["text"]) == ("", "")
    await channel.answer(again)
    assert (await row(quick, ordered))["state"] == "done"
    refused = await order(quick, channel.node)
    await channel.answer(await channel.read_type("job"), ok=False, code="not-taken", reason=why)
    hurry(quick, refused)
    assert why in (await until(quick, refused, "lapsed"))["text"]


# ---- ends


async def test_a_job_that_nobody_takes_lapses(quick: World, node: Node) -> None:
    ordered = await order(quick, node, lapse_s=1)
    told = await until(quick, ordered, "lapsed")
    assert (told["ok"], told["code"]) == (None, "lapsed")
    assert "never connected" in told["text"]
    async with node.connected() as channel:
        with pytest.raises(TimeoutError):
            await channel.read(0.7)


async def test_waiting_ends_when_the_last_row_has_ended_however_it_did(quick: World, node: Node) -> None:
    began = time.monotonic()
    done = await order(quick, node, lapse_s=1, wait_s=50)
    assert done["states"] == {"lapsed": 1}
    assert time.monotonic() - began < 45


async def test_a_node_that_took_a_job_and_is_gone_ends_as_lost_until_it_speaks(
    quick: World, node: Node
) -> None:
    async with node.connected() as channel:
        ordered = await order(quick, node)
        job = await channel.job()
        await until(quick, ordered, "taken")
    await eventually(lambda: quick.node(node.id)["state"] == "offline")
    hurry(quick, ordered)
    told = await until(quick, ordered, "lost")
    assert (told["ok"], told["code"]) == (None, "node-gone")
    async with node.connected() as channel:
        await channel.answer(job, reply={"late": True})
        told = await row(quick, ordered)
        assert (told["state"], told["ok"], told["reply"], told["code"]) == ("done", True, {"late": True}, "")
        await channel.answer(job, ok=False, reply={"lies": 1})  # acknowledged, changes nothing
    assert (await row(quick, ordered))["reply"] == {"late": True}


async def test_a_connected_node_that_never_answers_ends_as_lost(quick: World, channel: Channel) -> None:
    ordered = await order(quick, channel.node)
    await channel.job()
    await until(quick, ordered, "taken")
    hurry(quick, ordered)
    told = await until(quick, ordered, "lost")
    assert told["code"] == "no-result"


async def test_the_rows_of_a_revoked_node_end(quick: World, node: Node) -> None:
    ordered = await order(quick, node)
    await asyncio.to_thread(quick.ask, "POST", f"/nodes/{node.id}/revoke", json={"why": "sold"})
    assert (await until(quick, ordered, "lost"))["code"] == "revoked"
    refused = await asyncio.to_thread(
        quick.ask, "POST", "/jobs", 409, json={"module": "echo", "select": {"nodes": [node.id]}}
    )
    assert refused["error"]["code"] == "node-revoked"


# ---- cancelling


async def cancel(world: World, order_: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = await asyncio.to_thread(world.ask, "POST", f"/jobs/{order_['id']}/cancel")
    return found


async def test_what_is_not_taken_is_cancelled_at_once(quick: World, node: Node) -> None:
    ordered = await order(quick, node)
    cancelled = await cancel(quick, ordered)
    assert (cancelled["states"], cancelled["cancelled_by"] != "") == ({"cancelled": 1}, True)
    again = await cancel(quick, ordered)
    assert again["cancelled_at"] == cancelled["cancelled_at"]
    async with node.connected() as channel:
        with pytest.raises(TimeoutError):
            await channel.read(0.7)


async def test_what_was_sent_is_cancelled_and_its_node_told_until_it_knows(quick: World, node: Node) -> None:
    async with node.connected() as channel:
        ordered = await order(quick, node)
        job = await channel.read_type("job")
        assert (await cancel(quick, ordered))["states"] == {"cancelled": 1}
        assert (await channel.read_type("cancel"))["id"] == job["id"]
    async with node.connected() as channel:  # it may have taken the job, and missed the cancel
        assert (await channel.read_type("cancel"))["id"] == job["id"]
        await channel.answer(job, ok=False, reply={}, code="cancelled", reason="was not begun")
    assert (await row(quick, ordered))["ok"] is False
    async with node.connected() as channel:
        with pytest.raises(TimeoutError):
            await channel.read(0.7)


async def test_what_is_taken_ends_by_its_result(quick: World, node: Node) -> None:
    async with node.connected() as channel:
        ordered = await order(quick, node)
        job = await channel.job()
        await until(quick, ordered, "taken")
        assert (await cancel(quick, ordered))["states"] == {"taken": 1}
        assert (await channel.read_type("cancel"))["id"] == job["id"]
    async with node.connected() as channel:
        assert (await channel.read_type("cancel"))["id"] == job["id"]
        await channel.answer(job, ok=False, reply={}, code="cancelled", reason="ended by a cancel")
    told = await row(quick, ordered)
    assert (told["state"], told["text"]) == ("cancelled", "ended by a cancel")


async def test_cancelling_answers_who_waits(quick: World, node: Node) -> None:
    waiting = asyncio.create_task(order(quick, node, wait_s=50))
    await eventually(lambda: quick.ask("GET", "/jobs?limit=1")["orders"][0]["select"] == {"nodes": [node.id]})
    newest = (await asyncio.to_thread(quick.ask, "GET", "/jobs?limit=1"))["orders"][0]
    await cancel(quick, newest)
    assert (await waiting)["states"] == {"cancelled": 1}
