"""The rehearsal of a service module as the updater asks for it: the real runner, real limits, a copy of the data."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from instar.agent.check import Checks
from instar.agent.runners import Runners
from instar.agent.shelf import Shelf
from instar.core.errors import InputError
from instar.host.layout import Layout
from instar.host.line import Line
from instar.host.processes import start_time
from instar.host.program import Program
from tests.node import modules
from tests.node.world import Built, put

NAME = modules.NAME
KEEPS = """\
def start(context):
    state = context.load() or {"starts": 0}
    context.save({"starts": state["starts"] + 1})

def request(args, context):
    return {}

def stop(context):
    if context.load()["starts"] < 1:
        raise ValueError("nothing was kept")
"""
REST = "\ndef request(args, context): return {}\n"


class World:
    def __init__(self, state: Path, program: Program) -> None:
        self.layout = Layout(state)
        self.runners = Runners(program.command("runner"))
        self.checks = Checks(self.layout, Shelf(self.layout, []), self.runners)
        self.data = self.layout.staging / "tx-1" / "rehearsal-1" / "data"
        self.data.mkdir(parents=True)

    def put(self, text: str, **changes: Any) -> Built:
        built = modules.build("1.0.0", text, **{"stateful": True, **changes})
        line = Line(self.layout.module(NAME))
        line.layout.releases.mkdir(parents=True)
        put(line, built)
        return built

    def request(self, built: Built, within_s: float = 60.0, **changes: Any) -> dict[str, Any]:
        about = {"module": NAME, "version": "1.0.0", "digest": built.release.digest}
        return {**about, "data": str(self.data), "within_s": within_s, **changes}

    async def check(self, text: str, **changes: Any) -> dict[str, Any]:
        return await self.ended(self.request(self.put(text, **changes)))

    async def ended(self, request: dict[str, Any]) -> dict[str, Any]:
        for _ in range(10):
            said = await self.checks.answer(request)
            if said["done"]:
                return said
        raise AssertionError("it has no end")


@pytest.fixture
async def world(tmp_path: Path, program: Program) -> AsyncIterator[World]:
    made = World(tmp_path / "state", program)
    yield made
    await made.runners.close()


async def test_a_good_one_passes_on_the_data_that_it_is_given(world: World) -> None:
    (world.data / "state.json").write_text('{"starts": 6}')
    said = await world.check(KEEPS)
    assert (said["passed"], said["code"], said["text"]) == (True, "", "")
    assert 0 < said["seconds"] < 60
    assert json.loads((world.data / "state.json").read_text()) == {"starts": 7}
    assert not world.layout.module(NAME).data.exists(), "the module's own folder is no part of it"
    assert not world.layout.module(NAME).process.exists()


BAD: dict[str, tuple[str, str, str]] = {
    "no start": (REST, "no-symbol", "start"),
    "no module": ("raise ImportError('no libthing here')\n", "not-loadable", "no libthing here"),
    "start fails": ("def start(context): raise ValueError('bad state')" + REST, "module-failed", "ValueError"),
    "stop fails": (KEEPS.replace("< 1", "> 0"), "module-failed", "ValueError"),
    "syntax": ("def start(:\n", "not-loadable", "demo.watch"),
    "too much memory": ("def start(c): c.held = b'x' * (400 << 20)" + REST, "out-of-memory", ""),
    "ends": ("import os\ndef start(c): os._exit(0)" + REST, "rehearsal-failed", "exit status 0"),
    "ends badly": ("import os\ndef start(c): os._exit(5)" + REST, "rehearsal-failed", "exit status 5"),
    "crashes": ("import os\ndef start(c): os.abort()" + REST, "rehearsal-failed", "SIGABRT"),
    "talks without end": (
        "import os\ndef start(c):\n  while True: os.write(3, b'{\"log\": \"x\"}\\n' * 1000)" + REST, "too-much-output", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
async def test_a_bad_one_fails_in_words(world: World, case: str) -> None:
    text, code, words = BAD[case]
    said = await world.check(text)
    assert (said["passed"], said["code"]) == (False, code), said
    assert words in said["text"]


async def test_one_for_another_machine(world: World) -> None:
    said = await world.check(KEEPS, entry={"pdp11": "main.py"})
    assert (said["passed"], said["code"]) == (False, "wrong-machine")


async def test_one_that_hangs_is_ended_with_all_that_it_started(world: World, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    text = (
        "import os, time\n"
        "def start(context):\n"
        "    for _ in range(3):\n"
        "        if os.fork() == 0:\n"
        "            os.setsid()\n"
        "            if os.fork() == 0:\n"
        f"                os.write(os.open({str(pids)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), b'%d ' % os.getpid())\n"
        "                time.sleep(600)\n"
        "            os._exit(0)\n"
        "    time.sleep(600)\n" + REST
    )
    built, left = world.put(text, touches={"write": [str(tmp_path)]}), list[int]()
    for within_s in (3.0, 15.0, 45.0):  # where much else runs, it takes a while to get so far
        said = await world.ended(world.request(built, within_s))
        assert (said["passed"], said["code"]) == (False, "rehearsal-failed"), said
        left = [int(pid) for pid in pids.read_text().split()] if pids.exists() else []
        async with asyncio.timeout(60):
            while any(start_time(pid) for pid in left):
                await asyncio.sleep(0.02)
        if len(left) == 3:
            break
        pids.unlink(missing_ok=True)
    assert len(left) == 3


async def test_the_question_may_be_put_again_and_is_answered_once(world: World) -> None:
    request = world.request(world.put(KEEPS))
    first, second = await asyncio.gather(
        asyncio.create_task(world.checks.answer(request)), asyncio.create_task(world.checks.answer(request))
    )
    assert first == second
    assert first["passed"] is True
    assert json.loads((world.data / "state.json").read_text()) == {"starts": 1}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"digest": "0" * 96}, "no-module"),
        ({"version": "9.9.9"}, "no-module"),
        ({"module": "demo.none"}, "no-module"),
        ({"module": "../agent"}, "bad-module-name"),
        ({"module": 7}, "bad-request"),
        ({"data": "/"}, "bad-request"),
        ({"data": ""}, "bad-request"),
        ({"data": "staging/../../etc"}, "bad-request"),
        ({"within_s": 0}, "bad-request"),
        ({"within_s": 1e9}, "bad-request"),
        ({"within_s": "nan"}, "bad-request"),
        ({"within_s": None}, "bad-request"),
    ],
    ids=str,
)
async def test_a_request_that_makes_no_sense(world: World, changes: dict[str, Any], code: str) -> None:
    request = world.request(world.put(KEEPS), **changes)
    with pytest.raises(InputError) as caught:
        await world.checks.answer(request)
    assert caught.value.code == code
    assert os.listdir(world.data) == []
