"""Service modules are asked: while they run, fall, restart and stop. Real processes."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from instar.core.errors import InputError, InstarError, ReleaseError
from tests.agent.acting import World, module


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_a_question_is_answered_with_what_it_says_meanwhile(world: World) -> None:
    world.add(module("a"))
    lines: list[dict[str, Any]] = []
    async with world.running() as supervisor:
        reply = await supervisor.request("a", {"x": 1}, 60.0, lines.append)
        assert reply["x"] == 1
        assert [line["progress"] for line in lines] == [0.5]
        many = await asyncio.gather(*(world.asked("a", n=n) for n in range(40)))
        assert [reply["n"] for reply in many] == list(range(40))


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ({"fail": True}, "module-failed"),
        ({"wrong": True}, "bad-reply"),
        ({"die": True}, "interrupted"),
        ({"silent": True}, "deadline"),
        ({"x": "y" * 300_000}, "bad-job"),
    ],
)
async def test_a_question_that_ends_badly(world: World, args: dict[str, Any], code: str) -> None:
    world.add(module("a"))
    async with world.running() as supervisor:
        await world.all_ok()
        with pytest.raises(InstarError) as caught:
            await supervisor.request("a", args, 0.5 if code == "deadline" else 60.0, lambda _: None)
        assert caught.value.code == code


async def test_questions_nobody_can_answer(world: World) -> None:
    world.add(module("a"), error="broken")
    async with world.running() as supervisor:
        with pytest.raises(InputError) as caught:
            await supervisor.request("moon", {}, 5.0, lambda _: None)
        assert caught.value.code == "no-module"
        await world.until(lambda: supervisor.states()["a"] == "failed")
        with pytest.raises(ReleaseError) as failed:
            await supervisor.request("a", {}, 5.0, lambda _: None)
        assert failed.value.code == "module-failed"
        assert "broken" in failed.value.text


async def test_a_question_waits_for_one_that_has_just_fallen(world: World) -> None:
    world.add(module("a"))
    async with world.running() as supervisor:
        await world.all_ok()
        os.kill(supervisor.pids()["a"], signal.SIGKILL)
        await world.until(lambda: supervisor.states()["a"] == "failed")
        assert (await world.asked("a"))["starts"] == 2


async def test_a_question_during_a_restart_waits_for_its_end(world: World) -> None:
    world.add(module("a"))
    async with world.running() as supervisor:
        await world.all_ok()
        slow = asyncio.create_task(world.asked("a", sleep=0.5))
        await asyncio.sleep(0.1)
        restart = asyncio.create_task(supervisor.restart([], 30.0, "x"))
        await world.until(lambda: world.row("a")["life"] == "stop-asked")
        late = asyncio.create_task(world.asked("a"))
        assert (await slow)["starts"] == 1
        assert (await late)["starts"] == 2
        assert await restart == {"a": "running"}


async def test_open_questions_are_answered_before_all_is_stopped(world: World) -> None:
    world.add(module("a"))
    async with world.running() as supervisor:
        await world.all_ok()
        os.kill(supervisor.pids()["a"], signal.SIGKILL)
        await world.until(lambda: supervisor.states()["a"] == "failed")
        questions = [asyncio.create_task(world.asked("a", sleep=0.2)) for _ in range(3)]
        await asyncio.sleep(0)
        assert await supervisor.stop_all(120.0, "x") == {"a": "stopped"}
        assert [(await question)["starts"] for question in questions] == [2, 2, 2]
        with pytest.raises(ReleaseError) as caught:
            await world.asked("a")
        assert caught.value.code == "interrupted"


async def test_a_question_that_is_never_answered_does_not_keep_the_agent_from_its_end(world: World) -> None:
    world.add(module("a"))
    async with world.running() as supervisor:
        await world.all_ok()
        question = asyncio.create_task(world.asked("a", silent=True))
        await asyncio.sleep(0.1)
        assert await supervisor.stop_all(6.0, "x") == {"a": "stopped"}
        with pytest.raises(ReleaseError) as caught:
            await question
        assert caught.value.code == "interrupted"
