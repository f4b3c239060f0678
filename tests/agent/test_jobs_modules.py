"""Jobs and their modules: from the shelf, fetched first, asked of a service."""

from __future__ import annotations

import asyncio
import os

import pytest

from instar.agent.jobs import PLACES
from instar.core.errors import ReleaseError
from instar.wire.messages import Output
from tests.agent.spawning import children
from tests.agent.working import World, world

__all__ = ["world"]


async def test_a_module_from_the_shelf(world: World) -> None:
    made = world.shelves.put(
        "disk.usage", limits={"output": 5000}, timeouts={"run_s": 7.0}, touches={"write": ("/x",)}
    )
    jobs = world.jobs()
    world.work(jobs)
    code = "open('litter', 'w'); os.makedirs('a/b/c'); reply = {'request': request, 'cwd': os.getcwd()}"
    job = world.job("a", code=code, module="disk.usage", version=made.version, digest=made.digest)
    jobs.take(job)
    reply = (await world.result()).reply
    request = reply["request"]
    assert (request["v"], request["do"], request["cwd"]) == (1, "run", reply["cwd"])
    assert request["module"]["folder"] == str(
        world.shelves.layout.module("disk.usage").releases / f"1.0.0-{made.digest[:12]}"
    )
    assert (request["module"]["entry"], request["module"]["runs"]) == ("main.py", "python")
    assert (request["limits"]["output"], request["limits"]["seconds"]) == (5000, 7.0)
    assert request["touches"] == {"read": [], "write": ["/x"], "network": False}
    assert reply["cwd"].startswith(str(world.scratch))
    assert not os.path.exists(reply["cwd"])
    assert world.shelves.layout.module("disk.usage").used.exists()


async def test_a_module_that_is_not_there_is_fetched_first(world: World) -> None:
    made, go = world.shelves.offer("disk.usage"), world.shelves.plan / "go"
    world.shelves.act({"bring": True, "until": str(go)})
    jobs = world.jobs()
    world.work(jobs)
    for name in ("a", "b"):
        jobs.take(
            world.job(
                name,
                module="disk.usage",
                version="1.0.0",
                digest=made.digest,
                target=made.target,
                deadline_s=60,
            )
        )
    for n in range(PLACES):
        jobs.take(world.job(f"other{n}"))  # fetching holds none of the places
    assert {(await world.result()).id for _ in range(PLACES)} == {f"other{n}" for n in range(PLACES)}
    go.touch()
    assert [(await world.result()).ok for _ in range(2)] == [True] * 2
    assert world.shelves.asked() == ["disk.usage"]


async def test_a_module_that_cannot_be_had(world: World) -> None:
    world.shelves.act(
        {"say": {"ok": False, "error": {"code": "wish-differs", "text": "cannot trust it"}, "kind": "trust"}}
    )
    jobs = world.jobs()
    world.work(jobs)
    jobs.take(world.job("a", module="disk.usage", version="1.0.0", digest="0" * 96, target="module/x"))
    result = await world.result()
    assert (result.code, result.reason) == ("no-module", "cannot trust it (wish-differs)")
    jobs.take(world.job("b", module="../x", version="1.0.0", digest="0" * 96))
    assert (await world.result()).code == "bad-job"
    assert world.log.read_text() == ""


async def test_a_server_that_is_away_is_asked_again(world: World) -> None:
    made = world.shelves.offer("disk.usage")
    away = {"say": {"ok": False, "error": {"code": "server-unreachable", "text": "x"}, "kind": "unreachable"}}
    world.shelves.act(away, {"bring": True})
    jobs = world.jobs()
    world.work(jobs)
    jobs.take(world.job("a", module="disk.usage", version="1.0.0", digest=made.digest, target=made.target))
    assert (await world.result()).ok
    assert len(world.shelves.asked()) == 2


async def test_a_fetch_that_was_killed_is_tried_again(world: World) -> None:
    made = world.shelves.offer("disk.usage")
    world.shelves.act({"kill": True}, {"bring": True})
    jobs = world.jobs()
    world.work(jobs)
    jobs.take(world.job("a", module="disk.usage", version="1.0.0", digest=made.digest, target=made.target))
    assert (await world.result()).ok
    assert len(world.shelves.asked()) == 2


@pytest.mark.parametrize("how", ["lapse", "cancel", "stop"])
async def test_a_fetch_that_takes_long_is_let_go(world: World, how: str) -> None:
    go = world.shelves.plan / "go"
    world.shelves.act({"until": str(go)})
    jobs = world.jobs()
    world.work(jobs)
    lapse_s = 0.3 if how == "lapse" else 0.0
    jobs.take(
        world.job("a", module="disk.usage", version="1.0.0", digest="0" * 96, target="t", lapse_s=lapse_s)
    )
    async with asyncio.timeout(60):
        while not world.shelves.asked():
            await asyncio.sleep(0.01)
    if how == "cancel":
        jobs.cancel("a")
    if how == "stop":
        await jobs.finish(60.0)
        assert world.files("inbox")
    else:
        assert (await world.result()).code == {"lapse": "lapsed", "cancel": "cancelled"}[how]
    go.touch()
    async with asyncio.timeout(60):
        while children():
            await asyncio.sleep(0.01)


async def test_a_question_to_a_service(world: World) -> None:
    jobs = world.jobs()
    world.work(jobs)
    jobs.take(world.job("a", module="asked", digest="0" * 96, version="1.0.0", deadline_s=9.0))
    result = await world.result()
    assert (result.ok, result.reply) == (True, {"n": 1})
    assert world.services.questions[0][0::2] == ("asked", 9.0)
    assert (await world.next(Output)).text == "asked"
    world.services.answer = ReleaseError("module-failed", "it cannot")
    jobs.take(world.job("b", module="asked"))
    assert (await world.result()).code == "module-failed"
    assert [(path, world.files(path)) for path in ("inbox", "running")] == [("inbox", []), ("running", [])]


@pytest.mark.parametrize(
    ("how", "code"), [("cancel", "cancelled"), ("stop", "interrupted"), ("late", "deadline")]
)
async def test_a_question_that_is_not_answered(world: World, how: str, code: str) -> None:
    world.services.answer = None
    jobs = world.jobs()
    world.work(jobs)
    jobs.take(world.job("a", module="asked", deadline_s=0.3 if how == "late" else 60.0))
    async with asyncio.timeout(60):
        while not world.services.questions:
            await asyncio.sleep(0.01)
    if how == "cancel":
        jobs.cancel("a")
    if how == "stop":
        await jobs.finish(0.1)
    assert (await world.result()).code == code
    assert world.services.cancelled == 1


async def test_a_service_that_does_not_run(world: World) -> None:
    made = world.shelves.put("inventory", mode="service")
    jobs = world.jobs()
    world.work(jobs)
    jobs.take(world.job("a", module="inventory", version="1.0.0", digest=made.digest))
    assert (await world.result()).code == "no-module"
