"""Jobs: once, in order, and nothing is lost when the agent dies in between; stopped and cancelled."""

from __future__ import annotations

import asyncio

import pytest

from instar.agent.jobs import PLACES
from instar.agent.store import MOST_HELD, DiskStore
from instar.core.errors import InputError
from instar.host import points
from instar.wire.messages import Result, Taken
from tests.agent.working import World, at_once, end, world

__all__ = ["world"]


# --- once, and in order


async def test_begun_in_order_of_arrival_and_once_each(world: World) -> None:
    jobs = world.jobs()
    names = ["c", "a", "b", "z", "y", "x", "d"]
    for name in (*names, "a", "c"):
        jobs.take(world.job(name, hold=True))
    world.work(jobs)
    await world.until_noted(*names[:PLACES])
    assert set(world.log.read_text().split()) == set(names[:PLACES])
    world.go()
    assert {(await world.result()).id for _ in names} == set(names)
    jobs.acknowledged("a")
    jobs.take(world.job("a"))
    await asyncio.sleep(0.2)
    assert sorted(world.log.read_text().split()) == sorted(names)


async def test_four_at_once_and_no_more(world: World) -> None:
    jobs = world.jobs()
    for n in range(PLACES + 2):
        jobs.take(world.job(f"j{n}", hold=True))
    world.work(jobs)
    await world.until_noted(*(f"j{n}" for n in range(PLACES)))
    await asyncio.sleep(0.1)
    assert len(world.log.read_text().split()) == PLACES
    assert (len(world.files("running")), len(world.files("inbox"))) == (PLACES, 2)
    world.go()
    for _ in range(PLACES + 2):
        assert (await world.result()).ok


async def test_taken_is_said_once_it_is_on_the_disk_and_for_each_repeat(world: World) -> None:
    jobs = world.jobs()
    seen: list[str] = []
    points.listener = seen.append
    try:
        for _ in range(3):
            jobs.take(world.job("a"))
    finally:
        points.listener = None
    assert [await world.next(Taken) for _ in range(3)] == [Taken("a")] * 3
    assert seen == ["job:received", "job:taken"]
    assert len(world.files("inbox")) == 1
    jobs.take(world.job("h", purpose="health"))  # from memory: nothing of it is on the disk
    assert not [message for message in world.sent if isinstance(message, Taken)]


async def test_the_points_on_a_jobs_way(world: World) -> None:
    jobs = world.jobs()
    seen: list[tuple[str, list[str]]] = []
    points.listener = lambda point: seen.append((point, [f for f in ("inbox", "running") if world.files(f)]))
    try:
        world.work(jobs)
        jobs.take(world.job("a"))
        await world.result()
        assert world.files("outbox") == ["a.json"]
        jobs.acknowledged("a")
    finally:
        points.listener = None
    assert seen == [
        ("job:received", ["inbox"]),
        ("job:taken", ["inbox"]),
        ("job:started", ["running"]),
        ("job:ran", ["running"]),
        ("job:finished", ["running"]),
        ("job:sent", []),
        ("job:acked", []),
    ]


async def test_what_waited_is_done_by_the_next_agent(world: World) -> None:
    first = world.jobs()
    for name in ("z", "m", "k"):
        first.take(world.job(name))
    second = world.jobs()  # the first one died before it started anything
    second.take(world.job("m"))
    second.take(world.job("a"))
    world.work(second)
    assert {(await world.result()).id for _ in range(4)} == {"z", "m", "k", "a"}
    assert sorted(world.log.read_text().split()) == ["a", "k", "m", "z"]


async def test_what_ran_when_the_agent_died_is_not_run_again(world: World) -> None:
    store = DiskStore(world.folder, apart=at_once)
    store.receive(world.job("x"))
    store.start("x")
    jobs = world.jobs()
    jobs.resend()
    result = await world.result()
    assert (result.id, result.ok, result.code) == ("x", False, "interrupted")
    assert "the agent ended while it ran" in result.reason
    assert world.log.read_text() == ""


async def test_results_are_kept_until_acknowledged(world: World) -> None:
    store = DiskStore(world.folder, apart=at_once)
    store.receive(world.job("x"))
    store.start("x")
    store.finish(Result("x", True))
    for _ in range(2):
        jobs = world.jobs()
        jobs.resend()
        assert (await world.result()).id == "x"
    jobs.acknowledged("x")
    jobs.acknowledged("x")
    again = world.jobs()
    again.resend()
    again.take(world.job("x"))
    assert world.sent == [Taken("x")]
    assert again.held == 0


async def test_a_long_job_does_not_hold_up_a_verdict(world: World) -> None:
    jobs = world.jobs()
    for n in range(PLACES):
        jobs.take(world.job(f"long{n}", hold=True))
    task = world.work(jobs)
    jobs.take(world.job("check", purpose="health"))
    assert (await world.result()).id == "check"
    await end(task)
    assert len(world.files("outbox")) == PLACES


async def test_the_number_of_jobs_is_bounded(world: World) -> None:
    jobs = world.jobs()
    for number in range(MOST_HELD):
        jobs.take(world.job(f"h{number}", purpose="health"))
    jobs.take(world.job("one-more"))
    result = await world.result()
    assert (result.id, result.ok, result.code) == ("one-more", False, "not-taken")
    assert "held already" in result.reason


@pytest.mark.parametrize("bad", ["", "../x", ".hidden", "a/b", "x" * 65, "a\n", "ä"])
async def test_ids_that_are_no_file_names_are_refused(world: World, bad: str) -> None:
    jobs = world.jobs()
    with pytest.raises(InputError, match="cannot take job"):
        jobs.take(world.job(bad))
    with pytest.raises(InputError, match="cannot take job"):
        jobs.cancel(bad)


# --- stopping


async def test_stopping_leaves_what_waits(world: World) -> None:
    jobs = world.jobs()
    for n in range(PLACES + 1):
        jobs.take(world.job(f"a{n}", hold=True))
    task = world.work(jobs)
    await world.until_noted(*(f"a{n}" for n in range(PLACES)))
    finishing = asyncio.create_task(jobs.finish(60.0))
    await asyncio.sleep(0)  # it begins nothing more from now on
    world.go()
    await finishing
    assert {(await world.result()).id for _ in range(PLACES)} == {f"a{n}" for n in range(PLACES)}
    jobs.take(world.job("late"))
    assert await world.next(Taken)
    await end(task)
    assert len(world.log.read_text().split()) == PLACES
    assert len(world.files("inbox")) == 2


async def test_stopping_kills_what_takes_too_long(world: World) -> None:
    jobs = world.jobs()
    jobs.take(world.job("a", sleep=60))
    world.work(jobs)
    await world.until_noted("a")
    await jobs.finish(0.1)
    result = await world.result()  # it is sent, while there is a connection
    assert (result.id, result.ok, result.code, result.signal) == ("a", False, "interrupted", 9)
    again = world.jobs()
    again.resend()
    assert await world.result() == result


async def test_cancelled_without_a_word_before(world: World) -> None:
    jobs = world.jobs()
    jobs.take(world.job("a", sleep=60))
    task = world.work(jobs)
    await world.until_noted("a")
    await end(task)
    assert (await world.result()).code == "interrupted"


# --- cancelling


async def test_cancel_before_it_began(world: World) -> None:
    jobs = world.jobs()
    jobs.take(world.job("a"))
    jobs.cancel("a")
    result = await world.result()
    assert (result.id, result.code) == ("a", "cancelled")
    jobs.cancel("a")
    assert await world.result() == result
    again = world.jobs()
    world.work(again)
    again.take(world.job("a"))
    assert await world.result() == result
    await asyncio.sleep(0.1)
    assert world.log.read_text() == ""
    again.acknowledged("a")
    again.cancel("a")
    assert again.held == 0


async def test_cancel_while_it_runs(world: World) -> None:
    jobs = world.jobs()
    jobs.take(world.job("a", sleep=60))
    world.work(jobs)
    await world.until_noted("a")
    jobs.cancel("a")
    jobs.cancel("a")
    result = await world.result()
    assert (result.id, result.code, result.signal) == ("a", "cancelled", 9)


async def test_cancel_comes_before_the_job(world: World) -> None:
    jobs = world.jobs()
    world.work(jobs)
    jobs.cancel("a")
    result = await world.result()
    assert (result.code, result.ok) == ("cancelled", False)
    again = world.jobs()
    world.work(again)
    again.take(world.job("a"))
    assert await world.result() == result
    assert world.log.read_text() == ""
