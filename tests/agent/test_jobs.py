"""Jobs and their store: once, in order, and nothing is lost when the agent dies in between."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from instar.agent.jobs import Jobs
from instar.agent.store import KEPT, MOST_HELD, DiskStore
from instar.core.errors import InputError
from instar.wire.messages import Job, Result

COUNTING = """
import json, sys, time
job = json.loads(sys.stdin.read())
time.sleep(job["args"].get("sleep", 0))
with open(job["args"]["log"], "a") as log: log.write(job["args"]["name"] + " ")
print(json.dumps({"ok": True, "reply": {}}))
"""
COMMAND = [sys.executable, "-I", "-S", "-c", COUNTING]


class World:
    """A jobs folder, a log that the runners write to, and the results that were sent."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "jobs", folder / "log"
        self.log.touch()
        self.sent: asyncio.Queue[Result] = asyncio.Queue()

    def jobs(self) -> Jobs:
        return Jobs(DiskStore(self.folder), COMMAND, self.send)

    def send(self, result: Result) -> bool:
        self.sent.put_nowait(result)
        return True

    def job(self, name: str, purpose: str = "job", sleep: float = 0.0) -> Job:
        return Job(name, "count", purpose, {"log": str(self.log), "name": name, "sleep": sleep})

    async def result(self) -> Result:
        async with asyncio.timeout(10):
            return await self.sent.get()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def test_in_order_of_arrival_and_once_each(world: World) -> None:
    jobs = world.jobs()
    for name in ("c", "a", "b", "a", "c"):
        jobs.take(world.job(name))
    task = asyncio.create_task(jobs.run())
    assert [(await world.result()).id for _ in range(3)] == ["c", "a", "b"]
    jobs.acknowledged("a")
    jobs.take(world.job("a"))
    await asyncio.sleep(0.2)
    assert world.log.read_text().split() == ["c", "a", "b"]
    await end(task)


async def test_what_waited_is_done_by_the_next_agent_in_the_same_order(world: World) -> None:
    first = world.jobs()
    for name in ("z", "m", "k"):
        first.take(world.job(name))
    second = world.jobs()  # the first one died before it started anything
    second.take(world.job("m"))
    second.take(world.job("a"))
    task = asyncio.create_task(second.run())
    assert [(await world.result()).id for _ in range(4)] == ["z", "m", "k", "a"]
    await end(task)


async def test_what_ran_when_the_agent_died_is_not_run_again(world: World) -> None:
    store = DiskStore(world.folder)
    store.receive(world.job("x"))
    store.start("x")
    jobs = world.jobs()
    jobs.resend()
    result = await world.result()
    assert (result.id, result.ok) == ("x", False)
    assert "the agent ended while it ran" in result.reason
    assert world.log.read_text() == ""


async def test_killed_between_result_and_removal(world: World) -> None:
    store = DiskStore(world.folder)
    store.receive(world.job("x"))
    store.start("x")
    name = next((world.folder / "running").iterdir())
    kept = name.read_bytes()
    store.finish(Result("x", True, {"a": 1}))
    name.write_bytes(kept)  # the removal did not happen
    jobs = world.jobs()
    jobs.resend()
    assert (await world.result()) == Result("x", True, {"a": 1})
    assert list((world.folder / "running").iterdir()) == []


async def test_results_are_kept_until_acknowledged(world: World) -> None:
    store = DiskStore(world.folder)
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
    assert world.sent.empty()
    assert again.held == 0


async def test_unreadable_files_are_set_aside(world: World) -> None:
    jobs = world.jobs()
    jobs.take(world.job("good"))
    for folder in ("inbox", "running", "outbox"):
        (world.folder / folder / "000000000099.bad.json").write_text('{"t": "jo')
    (world.folder / "inbox" / "notes.txt").write_text("not ours")
    second = world.jobs()
    second.resend()
    task = asyncio.create_task(second.run())
    assert (await world.result()).id == "good"
    assert len(list(world.folder.rglob("*.unreadable"))) == 3
    await end(task)


async def test_a_long_job_does_not_hold_up_a_verdict(world: World) -> None:
    jobs = world.jobs()
    jobs.take(world.job("long", sleep=5))
    task = asyncio.create_task(jobs.run())
    jobs.take(world.job("check", purpose="health"))
    assert (await world.result()).id == "check"
    await end(task)
    assert [path.name for path in (world.folder / "outbox").iterdir()] == ["long.json"]


async def test_stopping_leaves_what_waits(world: World) -> None:
    jobs = world.jobs()
    jobs.take(world.job("a", sleep=0.3))
    jobs.take(world.job("b"))
    task = asyncio.create_task(jobs.run())
    await asyncio.sleep(0.05)
    await jobs.finish(5.0)
    assert (await world.result()).id == "a"
    await end(task)
    assert world.log.read_text().split() == ["a"]
    assert len(list((world.folder / "inbox").iterdir())) == 1


async def test_stopping_kills_what_takes_too_long(world: World) -> None:
    jobs = world.jobs()
    jobs.take(world.job("a", sleep=60))
    task = asyncio.create_task(jobs.run())
    await asyncio.sleep(0.1)
    await jobs.finish(0.1)
    await end(task)
    second = world.jobs()
    second.resend()
    result = await world.result()
    assert (result.id, result.ok) == ("a", False)
    assert "stopped while it ran" in result.reason


@pytest.mark.parametrize("bad", ["", "../x", ".hidden", "a/b", "x" * 65, "a\n", "ä"])
def test_ids_that_are_no_file_names_are_refused(world: World, bad: str) -> None:
    with pytest.raises(InputError, match="cannot take job"):
        world.jobs().take(world.job(bad))


async def test_the_number_of_jobs_is_bounded(world: World) -> None:
    jobs = world.jobs()
    for number in range(MOST_HELD):
        jobs.take(world.job(f"h{number}", purpose="health"))
    jobs.take(world.job("one-more"))
    result = await world.result()
    assert (result.id, result.ok) == ("one-more", False)
    assert "held already" in result.reason


def test_memory_of_the_past_is_bounded(world: World) -> None:
    store = DiskStore(world.folder)
    (world.folder / "done").mkdir(exist_ok=True)
    for number in range(KEPT + 10):
        (world.folder / "done" / f"d{number:04}.json").write_text("{}")
    store = DiskStore(world.folder)
    assert len(list((world.folder / "done").iterdir())) == KEPT
    assert not store.known("d0000")
    assert store.known(f"d{KEPT + 9:04}")
