"""Jobs and their store: once, in order, and nothing is lost when the agent dies in between."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from instar.agent.jobs import PLACES, Jobs
from instar.agent.runners import Runners
from instar.agent.spares import COUNT, SIZE
from instar.agent.store import KEPT, MOST_HELD, DiskStore
from instar.core.errors import InputError, MachineError, ReleaseError
from instar.host import points
from instar.host.clock import Clock
from instar.host.files import Disk
from instar.wire.codec import encode
from instar.wire.messages import Job, Message, Output, Result, Taken
from tests.agent import shelving
from tests.agent.spawning import COMMAND, children, descriptors

Kind = TypeVar("Kind", bound=Message)
NOTE = """
import time
def note(word):
    with open(request["args"]["log"], "a") as log: log.write(word + " ")
note(request["args"]["name"])
time.sleep(request["args"].get("sleep", 0))
"""


class FakeClock(Clock):
    """Wall and boot time that a test moves on; the loop's own time goes as it goes."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def wall(self) -> float:
        return super().wall() + self.ahead

    def boottime(self) -> float:
        return super().boottime() + self.ahead


class Services:
    """A service module `asked` that a test plays."""

    def __init__(self) -> None:
        self.questions: list[tuple[str, dict[str, Any], float]] = []
        self.answer: dict[str, Any] | Exception | None = {"n": 1}
        self.cancelled = 0

    def states(self) -> dict[str, str]:
        return {"asked": "ok"}

    async def request(
        self, name: str, args: dict[str, Any], deadline_s: float, heed: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        self.questions.append((name, args, deadline_s))
        heed({"id": "1", "log": "asked"})
        if isinstance(self.answer, Exception):
            raise self.answer
        try:
            if self.answer is None:
                await asyncio.sleep(600)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.answer or {}


class World:
    """A jobs folder, a shelf, a log that the jobs write to, and what was sent."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.scratch = folder / "jobs", folder / "log", folder / "scratch"
        self.log.touch()
        self.sent: list[Message] = []
        self.came = asyncio.Event()
        self.shelves, self.services, self.clock = shelving.World(folder), Services(), FakeClock()
        self.runners: list[Runners] = []
        self.tasks: list[asyncio.Task[None]] = []

    def jobs(self) -> Jobs:
        """Of an agent that has just started, and has not begun to work."""
        self.runners.append(Runners(COMMAND, grouped=False))
        disk = DiskStore(self.folder, self.clock.wall, boot_id="boot", apart=at_once)
        return Jobs(
            disk, self.runners[-1], self.shelves.shelf, lambda: self.services, self.send, self.scratch, self.clock,
            lambda: 0.0,
        )  # fmt: skip

    def work(self, jobs: Jobs) -> asyncio.Task[None]:
        self.tasks.append(asyncio.create_task(jobs.run()))
        return self.tasks[-1]

    def send(self, message: Message) -> bool:
        self.sent.append(message)
        self.came.set()
        return True

    def job(self, name: str, purpose: str = "job", sleep: float = 0.0, code: str = "", **more: Any) -> Job:
        args = {"log": str(self.log), "name": name, "sleep": sleep, "code": NOTE + code}
        return Job(name, more.pop("module", "count"), purpose, args, **more)

    async def next(self, kind: type[Kind], within_s: float = 10.0) -> Kind:
        """The next message of `kind`; others are kept."""
        async with asyncio.timeout(within_s):
            while True:
                for message in self.sent:
                    if isinstance(message, kind):
                        self.sent.remove(message)
                        return message
                self.came.clear()
                await self.came.wait()

    async def result(self) -> Result:
        return await self.next(Result)

    async def until_noted(self, name: str) -> None:
        async with asyncio.timeout(10):
            while name not in self.log.read_text().split():
                await asyncio.sleep(0.01)

    def files(self, folder: str) -> list[str]:
        return sorted(path.name for path in (self.folder / folder).iterdir())


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    before = descriptors()
    made = World(tmp_path)
    yield made
    for task in made.tasks:
        task.cancel()
    if made.tasks:
        await asyncio.wait(made.tasks)
    for runners in made.runners:
        await runners.close()
    assert descriptors() == before
    assert children() == []
    assert not made.scratch.exists() or list(made.scratch.iterdir()) == []


def at_once(work: Callable[[], None]) -> None:
    work()


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


# --- once, and in order


async def test_begun_in_order_of_arrival_and_once_each(world: World) -> None:
    jobs = world.jobs()
    names = ["c", "a", "b", "z", "y", "x", "d"]
    for name in (*names, "a", "c"):
        jobs.take(world.job(name, sleep=0.05))
    world.work(jobs)
    assert {(await world.result()).id for _ in names} == set(names)
    jobs.acknowledged("a")
    jobs.take(world.job("a"))
    await asyncio.sleep(0.2)
    done = world.log.read_text().split()
    assert sorted(done) == sorted(names)
    assert set(done[:PLACES]) == set(names[:PLACES])


async def test_four_at_once_and_no_more(world: World) -> None:
    jobs = world.jobs()
    for n in range(PLACES + 2):
        jobs.take(world.job(f"j{n}", sleep=0.6))
    world.work(jobs)
    await world.until_noted(f"j{PLACES - 1}")
    await asyncio.sleep(0.1)
    assert len(world.log.read_text().split()) == PLACES
    assert (len(world.files("running")), len(world.files("inbox"))) == (PLACES, 2)
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
        jobs.take(world.job(f"long{n}", sleep=5))
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
        jobs.take(world.job(f"a{n}", sleep=0.3))
    task = world.work(jobs)
    await world.until_noted("a0")
    await jobs.finish(5.0)
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


# --- lapse and deadline


async def test_a_job_that_lapsed_while_the_node_was_off(world: World) -> None:
    world.jobs().take(world.job("a", lapse_s=100.0))
    world.jobs().take(world.job("b", lapse_s=300.0))
    world.clock.ahead = 200.0
    jobs = world.jobs()
    world.work(jobs)
    results = {result.id: result for result in [await world.result() for _ in range(2)]}
    assert (results["a"].code, results["b"].ok) == ("lapsed", True)
    assert world.log.read_text().split() == ["b"]


async def test_a_job_that_lapses_while_it_waits(world: World) -> None:
    jobs = world.jobs()
    for n in range(PLACES):
        jobs.take(world.job(f"long{n}", sleep=30))
    world.work(jobs)
    await world.until_noted(f"long{PLACES - 1}")
    jobs.take(world.job("a", lapse_s=0.2))
    result = await world.result()
    assert (result.id, result.code) == ("a", "lapsed")


async def test_a_clock_that_was_set_lapses_nothing_that_was_just_received(world: World) -> None:
    class Jumping(Clock):
        ahead = 0.0

        def wall(self) -> float:
            return super().wall() + self.ahead

    world.clock = clock = Jumping()  # type: ignore[assignment]
    jobs = world.jobs()
    jobs.take(world.job("a", lapse_s=60.0))
    clock.ahead = 1e9
    world.work(jobs)
    assert (await world.result()).ok
    clock.ahead = -1e9  # and one that goes back ends no wait early
    world.jobs().take(world.job("b", lapse_s=60.0))


async def test_the_deadline(world: World) -> None:
    jobs = world.jobs()
    jobs.take(world.job("a", sleep=60, deadline_s=0.3))
    world.work(jobs)
    result = await world.result()
    assert (result.code, result.signal) == ("deadline", 9)
    assert "within 0.3 s" in result.reason


@pytest.mark.parametrize(
    ("code", "expected", "words"),
    [
        ("os.abort()", "signal", "SIGABRT"),
        ("os._exit(3)", "failed", "got exit 3 and no reply"),
        ("reply = None", "failed", "got exit 0 and no reply"),
        ("reply = 7", "failed", "no good reply"),
        ("say({'ok': True, 'reply': {}}); os._exit(1)", "failed", "exit 1 after the reply"),
        ("say({'ok': False}); reply = None", "failed", "not why"),
        (
            "say({'ok': False, 'error': {'code': 'wrong-abi', 'text': 'it is 9'}}); os._exit(2)",
            "wrong-abi",
            "it is 9",
        ),
        ("raise ValueError('no')", "module-failed", "no"),
        ("while True: say(b'x' * 65536)", "output", "got more"),
        ("reply = {'x': float('nan')}", "bad-reply", "cannot use reply"),
        ("reply = {'x': '\\ud800'}", "bad-reply", "cannot use reply"),
        ("x = reply\nfor n in range(100): x['x'] = {}; x = x['x']", "bad-reply", "levels"),
        ("reply = {'x': 'y' * 262_050}", "bad-reply", "bytes"),
    ],
)
async def test_what_came_of_it(world: World, code: str, expected: str, words: str) -> None:
    jobs = world.jobs()
    world.work(jobs)
    jobs.take(world.job("a", code=code, deadline_s=20))
    result = await world.result()
    assert (result.ok, result.code) == (False, expected)
    assert words in result.reason
    encode(result)


# --- modules


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
    made = world.shelves.offer("disk.usage")
    world.shelves.act({"bring": True, "sleep": 0.5})
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
                deadline_s=5,
            )
        )
    for n in range(PLACES):
        jobs.take(world.job(f"other{n}"))  # fetching holds none of the places
    assert {(await world.result()).id for _ in range(PLACES)} == {f"other{n}" for n in range(PLACES)}
    results = [await world.result() for _ in range(2)]
    assert [(result.ok, result.seconds < 5) for result in results] == [(True, True)] * 2
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
    world.shelves.act({"sleep": 1.0})
    jobs = world.jobs()
    world.work(jobs)
    lapse_s = 0.3 if how == "lapse" else 0.0
    jobs.take(
        world.job("a", module="disk.usage", version="1.0.0", digest="0" * 96, target="t", lapse_s=lapse_s)
    )
    await asyncio.sleep(0.2)
    if how == "cancel":
        jobs.cancel("a")
    if how == "stop":
        await jobs.finish(5.0)
        assert world.files("inbox")
    else:
        assert (await world.result()).code == {"lapse": "lapsed", "cancel": "cancelled"}[how]
    await asyncio.sleep(1.0)  # until the child has ended


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
    await asyncio.sleep(0.1)
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


# --- what it says while it runs


async def test_output_comes_while_it_runs_and_in_pieces(world: World) -> None:
    jobs = world.jobs()
    world.work(jobs)
    code = """
for n in range(400):
    say({"log": f"line {n}"}); say({"progress": n / 400, "text": "step"})
time.sleep(0.3)
say({"log": "end"})
"""
    jobs.take(world.job("a", code=code))
    first = await world.next(Output)
    assert (first.id, first.seq) == ("a", 1)
    assert not [message for message in world.sent if isinstance(message, Result)]
    await world.result()
    rest = [message for message in world.sent if isinstance(message, Output)]
    assert [each.seq for each in rest] == list(range(2, len(rest) + 2))
    assert len(rest) < 30
    lines = "\n".join(each.text for each in (first, *rest) if each.kind == "log").splitlines()
    assert lines == [*(f"line {n}" for n in range(400)), "end"]
    last = [each for each in (first, *rest) if each.kind == "progress"][-1]
    assert (last.fraction, last.text) == (399 / 400, "step")


async def test_output_is_bounded(world: World) -> None:
    jobs = world.jobs()
    world.work(jobs)
    code = """
for n in range(900): say({"log": "x" * 1000})
for bad in ({"log": 7}, {"progress": "x"}, {"progress": 7}, {"progress": 0.1, "text": []}, {"log": "\\ud800"}): say(bad)
"""
    jobs.take(world.job("a", code=code))
    result = await world.result()
    assert result.ok
    sent = [message for message in world.sent if isinstance(message, Output)]
    for message in sent:
        encode(message)
    assert sum(len(each.text) for each in sent) < 65_536 * (2 + result.seconds)
    assert any("bytes are left out" in each.text for each in sent)


# --- the store


def names(folder: Path) -> list[str]:
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [name for name in found if not name.startswith("spare/")]


def test_killed_between_result_and_move(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.receive(Job("x", "m"))
    store.start("x")
    store.finish(Result("x", True, {"a": 1}))
    (tmp_path / "outbox" / "x.json").rename(tmp_path / "running" / "000000000001.x.json")
    again = DiskStore(tmp_path)
    assert again.recover() == []
    assert again.result("x") == Result("x", True, {"a": 1})
    assert names(tmp_path) == ["outbox/x.json"]


def test_a_torn_result_is_none(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.receive(Job("x", "m"))
    store.start("x")
    path = tmp_path / "running" / "000000000001.x.json"
    whole = encode(Result("x", True, {"a": 1})).encode()
    for size in (0, 1, 20, len(whole) - 1):
        again = tmp_path / f"again{size}"
        (again / "running").mkdir(parents=True)
        (again / "running" / path.name).write_bytes(path.read_bytes() + b"\n" + whole[:size])
        found = DiskStore(again)
        found.recover()
        result = found.result("x")
        assert result is not None
        assert result.code == "interrupted"
        assert DiskStore(again).result("x") == result


def test_files_of_an_older_agent_are_read(tmp_path: Path) -> None:
    for folder in ("inbox", "running", "outbox", "done"):
        (tmp_path / folder).mkdir()
    (tmp_path / "inbox" / "000000000007.new.json").write_text(encode(Job("new", "m")))
    (tmp_path / "running" / "000000000005.cut.json").write_text(encode(Job("cut", "m")))
    (tmp_path / "running" / "000000000006.both.json").write_text(encode(Job("both", "m")))
    (tmp_path / "outbox" / "both.json").write_text(encode(Result("both", True)))
    (tmp_path / "outbox" / "out.json").write_text(encode(Result("out", True)))
    (tmp_path / "done" / "old.json").write_text(encode(Result("old", True)))
    store = DiskStore(tmp_path)
    assert [(each.job.id, each.received) for each in store.recover()] == [("new", 0.0)]
    assert set(store.unacknowledged()) == {"cut", "both", "out"}
    assert all(store.known(name) for name in ("new", "cut", "both", "out", "old"))
    store.receive(Job("next", "m"))
    assert "inbox/000000000008.next.json" in names(tmp_path)
    for name in ("cut", "both", "out"):
        result = store.result(name)
        assert result is not None
        assert result.ok is (name != "cut")
        store.acknowledged(name)
    assert DiskStore(tmp_path).unacknowledged() == []


def test_when_it_was_received_is_kept(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, lambda: 1234.5)
    store.receive(Job("x", "m", args={"received": 7}))
    assert [each.received for each in DiskStore(tmp_path).recover()] == [1234.5]


def test_unreadable_files_are_set_aside(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.receive(Job("good", "m"))
    for folder in ("inbox", "running"):
        (tmp_path / folder / f"000000000099.bad-{folder}.json").write_text('{"t": "jo')
        (tmp_path / folder / f"000000000098.other-{folder}.json").write_text(encode(Job("another", "m")))
    (tmp_path / "outbox" / "bad2.json").write_text("")
    (tmp_path / "inbox" / "notes.txt").write_text("not ours")
    (tmp_path / "inbox" / ".000000000100.x.json.new").write_text("half")
    again = DiskStore(tmp_path)
    assert [each.job.id for each in again.recover()] == ["good"]
    assert again.result("bad2") is None
    assert len(list(tmp_path.rglob("*.unreadable"))) == 5
    assert not (tmp_path / "inbox" / ".000000000100.x.json.new").exists()


class Full(Disk):
    """A disk without room for new data, once `full`."""

    full = False

    def append(self, path: Path, data: bytes, mode: int) -> None:
        if self.full:
            super().append(path, data[: len(data) // 2], mode)
            raise OSError(28, "No space left on device")
        super().append(path, data, mode)


def test_a_result_that_does_not_fit_on_the_disk_is_held_in_memory(tmp_path: Path) -> None:
    disk = Full()
    store = DiskStore(tmp_path, disk=disk)
    store.receive(Job("x", "m"))
    store.start("x")
    disk.full = True
    with pytest.raises(MachineError, match="cannot write"):
        store.finish(Result("x", True))
    assert store.unacknowledged() == ["x"]
    assert store.result("x") == Result("x", True)
    again = DiskStore(tmp_path, disk=disk)  # killed now: the disk knows of no result, and still has no room
    again.recover()
    result = again.result("x")
    assert result is not None
    assert result.code == "interrupted"
    again.acknowledged("x")
    assert DiskStore(tmp_path).unacknowledged() == []
    store = DiskStore(tmp_path)
    assert store.recover() == []
    assert store.known("x")


def test_memory_of_the_past_is_bounded(tmp_path: Path) -> None:
    DiskStore(tmp_path)
    for number in range(KEPT + 10):
        (tmp_path / "done" / f"d{number:04}.json").write_text("{}")
    store = DiskStore(tmp_path)
    assert len(list((tmp_path / "done").iterdir())) == KEPT
    assert not store.known("d0000")
    assert store.known(f"d{KEPT + 9:04}")


def ready(folder: Path, boot: str = "boot") -> DiskStore:
    """A store that has spares."""
    store = DiskStore(folder, boot_id=boot, apart=at_once)
    store.receive(Job("first", "m"))
    store.finish(Result("first", True))
    store.acknowledged("first")
    return store


@pytest.mark.parametrize("soon", [True, False])
def test_begun_at_once_counts_as_begun_in_another_boot(tmp_path: Path, soon: bool) -> None:
    ready(tmp_path).receive(Job("x", "m"), soon=soon)
    assert [each.job.id for each in DiskStore(tmp_path, boot_id="boot").recover()] == ["x"]
    store = DiskStore(tmp_path, boot_id="another")
    assert [each.job.id for each in store.recover()] == ([] if soon else ["x"])
    result = store.result("x")
    assert (result.code if result else "") == ("interrupted" if soon else "")


def test_without_a_boot_id_the_start_is_synced(tmp_path: Path) -> None:
    ready(tmp_path, "").receive(Job("x", "m"), soon=True)
    assert [each.job.id for each in DiskStore(tmp_path, boot_id="boot").recover()] == ["x"]


@pytest.mark.parametrize("result", [None, Result("x", True, {"a": 1})])
def test_a_job_is_found_where_its_spare_was(tmp_path: Path, result: Result | None) -> None:
    """The power went before its new name was on the disk."""
    store = ready(tmp_path)
    store.receive(Job("x", "m"))
    if result is not None:
        store.finish(result)
    (path,) = list(tmp_path.rglob("*x.json"))
    path.rename(tmp_path / "spare" / "1-1-00000000")
    again = DiskStore(tmp_path, boot_id="another")
    assert [each.job.id for each in again.recover()] == ([] if result else ["x"])
    assert again.result("x") == result
    assert list((tmp_path / "spare").iterdir()) == []
    again.receive(Job("y", "m"))
    assert len(names(tmp_path)) == 3


def test_what_is_found_twice_is_not_taken_in_again(tmp_path: Path) -> None:
    store = ready(tmp_path)
    store.receive(Job("x", "m"))
    (path,) = (tmp_path / "inbox").iterdir()
    (tmp_path / "spare" / "1-1-00000000").write_bytes(path.read_bytes())
    (tmp_path / "spare" / "1-2-00000000").write_bytes(b"\0" * 10 + b"{")
    again = DiskStore(tmp_path, boot_id="boot")
    assert [each.job.id for each in again.recover()] == ["x"]
    assert list((tmp_path / "spare").iterdir()) == []


def test_a_disk_without_room_for_spares_does_without(tmp_path: Path) -> None:
    (tmp_path / "spare").write_text("in the way")
    store = DiskStore(tmp_path, boot_id="boot", apart=at_once)
    for name in ("x", "y"):
        store.receive(Job(name, "m"), soon=True)
        store.start(name)
        store.finish(Result(name, True))
    again = DiskStore(tmp_path)
    assert again.recover() == []
    assert set(again.unacknowledged()) == {"x", "y"}


def test_what_is_synced(tmp_path: Path) -> None:
    """Two before `taken`, one before the run, one before the result is sent, none for the ack; where a spare
    is ready and the run follows at once, one for both and one for the result."""
    calls: list[str] = []

    class Counting(Disk):
        def write_new(self, path: Path, data: bytes, mode: int) -> None:
            calls.append("file")
            super().write_new(path, data, mode)

        def append(self, path: Path, data: bytes, mode: int) -> None:
            calls.append("file")
            super().append(path, data, mode)

        def write_over(self, path: Path, data: bytes, offset: int) -> None:
            calls.append("over")
            super().write_over(path, data, offset)

        def sync_folder(self, path: Path) -> None:
            calls.append(path.name)
            super().sync_folder(path)

    made: list[Callable[[], None]] = []
    store = DiskStore(tmp_path, disk=Counting(), boot_id="boot", apart=made.append)
    steps: list[tuple[Callable[[], None], list[str]]] = [
        (lambda: store.receive(Job("x", "m"), soon=False), ["file", "inbox"]),
        (lambda: store.start("x"), ["running"]),
        (lambda: store.finish(Result("x", True)), ["file"]),
        (lambda: store.acknowledged("x"), []),
        (lambda: made.pop()(), [tmp_path.name, *["file"] * COUNT, "spare"]),
        (lambda: store.receive(Job("y", "m"), soon=True), ["over"]),
        (lambda: store.start("y"), []),
        (lambda: store.finish(Result("y", True)), ["over"]),
        (lambda: store.acknowledged("y"), []),
        (lambda: store.receive(Job("z", "m"), soon=False), ["over"]),
        (lambda: store.start("z"), ["running"]),
        (lambda: store.finish(Result("z", True, stderr="x" * SIZE)), ["file"]),
    ]
    for step, expected in steps:
        calls.clear()
        step()
        assert calls == expected
    assert json.loads((tmp_path / "done" / "x.json").read_text().splitlines()[1])["received"] > 0
