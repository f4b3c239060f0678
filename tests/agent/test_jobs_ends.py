"""How a job ends: its lapse, its deadline, what its runner did; and what it says while it runs."""

from __future__ import annotations

import pytest

from instar.agent.jobs import PLACES
from instar.agent.output import FRAMES_A_S
from instar.host.clock import Clock
from instar.wire.codec import encode
from instar.wire.messages import Output, Result
from tests.agent.working import World, world

__all__ = ["world"]


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
        jobs.take(world.job(f"long{n}", hold=True))
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
    jobs.take(world.job("a", code=code, deadline_s=60))
    result = await world.result()
    assert (result.ok, result.code) == (False, expected)
    assert words in result.reason
    encode(result)


# --- what it says while it runs


async def test_output_comes_while_it_runs_and_in_pieces(world: World) -> None:
    jobs = world.jobs()
    world.work(jobs)
    code = """
for n in range(400):
    say({"log": f"line {n}"}); say({"progress": n / 400, "text": "step"})
held()
say({"log": "end"})
"""
    jobs.take(world.job("a", code=code))
    first = await world.next(Output)
    assert (first.id, first.seq) == ("a", 1)
    assert not [message for message in world.sent if isinstance(message, Result)]
    world.go()
    result = await world.result()
    rest = [message for message in world.sent if isinstance(message, Output)]
    assert [each.seq for each in rest] == list(range(2, len(rest) + 2))
    assert len(rest) < FRAMES_A_S * result.seconds + 4
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
