"""`instarctl job`, `restart`, `module` and `node poke` against a real server, with a node that answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from instar.core.errors import InputError
from instar_server.ctl.jobs import arguments_of, value_of
from instar_server.ctl.main import app
from instar_server.ctl.orders import Progress, select, wait_s
from tests.server.following import Following
from tests.server.test_ctl import ctl, data
from tests.server.world import WITHIN_S, Node, World


async def run(world: World, *words: str) -> Result:
    return await asyncio.to_thread(ctl, world, *words)


@pytest.fixture
async def nodes(world: World) -> AsyncIterator[list[Node]]:
    """Two nodes of a group of their own, that do what they are told."""
    group = f"g{os.urandom(3).hex()}"
    found = [await asyncio.to_thread(world.new_node, group) for _ in range(2)]
    async with contextlib.AsyncExitStack() as stack:
        tasks = []
        for node in found:
            channel = await stack.enter_async_context(node.connected())
            tasks.append(asyncio.create_task(channel.answer_all()))
        yield found
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def group_of(world: World, node: Node) -> str:
    return str(world.node(node.id)["group"])


async def test_a_job_and_its_answers(world: World, nodes: list[Node]) -> None:
    group = await asyncio.to_thread(group_of, world, nodes[0])
    done = await run(world, "job", "run", "echo", "path=/var", "depth=2", "deep=true", "--group", group)
    assert done.exit_code == 0, done.stderr
    for node in nodes:
        assert node.id in done.stdout
    assert '"path": "/var", "depth": 2, "deep": true' in done.stdout
    assert "2 done" in done.stdout
    told = await run(world, "job", "run", "echo", "--node", nodes[0].id, "--json")
    order = json.loads(told.stdout)
    assert (order["states"], order["rows"][0]["output"]) == ({"done": 1}, "at work\n")
    shown = await run(world, "job", "show", order["id"])
    assert "echo 1.10.0" in shown.stdout
    listed = await run(world, "job", "list", "--limit", "1")
    assert order["id"] in listed.stdout


async def test_a_job_that_not_all_do_ends_with_1(world: World, nodes: list[Node]) -> None:
    away = await asyncio.to_thread(world.new_node)
    words = ["job", "run", "echo", "--node", nodes[0].id, "--node", away.id, "--wait", "6s"]
    done = await run(world, *words)
    assert done.exit_code == 1
    assert "1 done, 1 queued" in done.stdout
    assert "1 of 2 have not ended" in done.stderr
    order = json.loads((await run(world, "job", "list", "--limit", "1", "--json")).stdout)[0]
    cancelled = await run(world, "job", "cancel", order["id"])
    assert "1 cancelled, 1 done" in cancelled.stdout
    ordered = await run(world, "job", "run", "echo", "--node", away.id, "--no-wait")
    assert (ordered.exit_code, "ordered for 1 nodes" in ordered.stdout) == (0, True)


async def test_what_a_job_says_is_shown_as_it_says_it(world: World) -> None:
    node = await asyncio.to_thread(world.new_node)
    async with node.connected() as channel:
        running = Following(world, "job", "run", "echo", "--node", node.id)
        job, until, seq = await channel.job(), time.monotonic() + WITHIN_S, 0
        while not running.has_said(f"{node.id}  [bold]half way"):  # only who watches by then is told
            assert time.monotonic() < until
            seq += 1
            await channel.send("output", id=job["id"], seq=seq, kind="log", text="[bold]half way")
            await asyncio.sleep(0.3)
        await channel.answer(job, reply={"a": "[red]"})
        done = await running.done()
    assert done.exit_code == 0, done
    assert "said: [bold]half way" in done.stdout
    assert '"a": "[red]"' in done.stdout


async def test_a_failure_is_shown_in_full(world: World) -> None:
    node = await asyncio.to_thread(world.new_node)
    async with node.connected() as channel:
        running = asyncio.create_task(run(world, "job", "run", "echo", "--node", node.id))
        said = {
            "code": "signal",
            "reason": "killed by signal 11",
            "signal": 11,
            "stderr": "[red]boom[/red]\n",
        }
        await channel.answer(await channel.job(), ok=False, reply={}, **said)
        done = await running
    assert done.exit_code == 1
    for text in ("failed", "killed by signal 11", "signal 11", "stderr: [red]boom[/red]"):
        assert text in done.stdout


async def test_restarts(world: World, nodes: list[Node]) -> None:
    group = await asyncio.to_thread(group_of, world, nodes[0])
    for words, name, modules in (
        ([], "restart-agent", []),
        (["--module", "inventory"], "restart-module", ["inventory"]),
        (["--module", "inventory", "--agent"], "restart-agent", ["inventory"]),
        (["--modules-only"], "restart-module", []),
    ):
        done = await run(world, "restart", "--group", group, *words, "--json")
        assert done.exit_code == 0, done.stderr
        order = json.loads(done.stdout)
        assert (order["name"], order["args"]["modules"], order["states"]) == (name, modules, {"done": 2})


async def test_modules_and_wishes(world: World, nodes: list[Node]) -> None:
    node = nodes[0].id
    listed = await run(world, "module", "list")
    assert "inventory" in listed.stdout
    assert (
        await run(world, "want", "--node", node, "--module", "inventory", "--version", "1.1.0")
    ).exit_code == 0
    shown = await asyncio.to_thread(data, world, "node", "show", node)
    assert shown["wanted"]["module/inventory"]["version"] == "1.1.0"
    assert (await run(world, "unwant", "--node", node, "--module", "inventory")).exit_code == 0
    both = await run(world, "want", "--node", node, "--module", "a", "--line", "agent", "--version", "1.0.0")
    assert (both.exit_code, "[bad-options]" in both.stderr) == (2, True)


async def test_poke(world: World) -> None:
    node, knocks = await asyncio.to_thread(world.new_node), asyncio.Queue[bytes]()

    async def knocked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        knocks.put_nowait(await reader.read())
        writer.close()

    none = await run(world, "node", "poke", node.id)
    assert (none.exit_code, "[no-wake-port]" in none.stderr) == (2, True)
    async with await asyncio.start_server(knocked, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        async with node.channel() as channel:
            await channel.hello(wake_port=port)
            await channel.read_type("welcome")
            for words in (["nodes", "poke"], ["node", "poke", "--via-server"]):
                done = await run(world, *words, node.id)
                assert (done.exit_code, str(port) in done.stdout) == (0, True), done.stderr
                assert await asyncio.wait_for(knocks.get(), WITHIN_S) == b""
    with socket.socket() as deaf:  # nobody else may listen here
        deaf.bind(("127.0.0.1", 0))
        async with node.channel() as channel:
            await channel.hello(wake_port=deaf.getsockname()[1])
            await channel.read_type("welcome")
            silent = await run(world, "nodes", "poke", node.id)
    assert (silent.exit_code, "[no-answer]" in silent.stderr) == (4, True)


@pytest.mark.parametrize(
    ("words", "status", "code"),
    [
        (["job", "run", "echo"], 2, "bad-options"),
        (["job", "run", "echo", "--all", "--group", "x"], 2, "bad-options"),
        (["job", "run", "echo", "--where", "os"], 2, "bad-options"),
        (["job", "run", "echo", "x", "--all"], 2, "bad-options"),
        (["job", "run", "echo", "--all", "--deadline", "soon"], 2, "bad-time"),
        (["job", "run", "echo", "--all", "--args-file", "/nowhere"], 2, "bad-args"),
        (["job", "run", "nothing", "--all"], 6, "unknown-module"),
        (["job", "run", "echo", "--where", "planet=mars"], 6, "no-nodes"),
        (["job", "show", "o-000000000000000000000000"], 6, "unknown-order"),
        (["restart", "--module", "x"], 2, "bad-options"),
        (["restart", "--node", "n-0000000000000000"], 6, "unknown-node"),
    ],
)
def test_a_refusal_is_one_line_and_a_status(world: World, words: list[str], status: int, code: str) -> None:
    done = ctl(world, *words)
    assert (done.exit_code, done.stdout) == (status, "")
    assert f"[{code}]" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2), ("2.5", 2.5), ("true", True), ("null", None), ('"2"', "2"), ("[1,2]", [1, 2]), ("/var", "/var"),
        ("", ""), ("NaN", "NaN"), ("-Infinity", "-Infinity"), ("a=b", "a=b"), ("{", "{"), ("1.2.3", "1.2.3"),
    ],
)  # fmt: skip
def test_values_are_json_or_text(text: str, value: Any) -> None:
    assert value_of(text) == value
    assert type(value_of(text)) is type(value)


def test_arguments_come_from_a_file_and_the_line(tmp_path: Path) -> None:
    file = tmp_path / "args.json"
    file.write_text('{"a": 1, "b": {"c": null}}')
    assert arguments_of(["a=2", "d=x=y"], file) == {"a": 2, "b": {"c": None}, "d": "x=y"}
    for text in ("[1]", "{", ""):
        file.write_text(text)
        with pytest.raises(InputError):
            arguments_of([], file)


NODE = "n-0123456789abcdef"


def test_who_is_meant_and_how_long_is_waited() -> None:
    assert select(None, "g", False, ["os=linux", "x=a=b"]) == {
        "group": "g",
        "where": {"os": "linux", "x": "a=b"},
    }
    assert select(None, None, False, ["os=linux"]) == {"all": True, "where": {"os": "linux"}}
    assert select([NODE], None, False, None) == {"nodes": [NODE], "where": {}}
    assert (wait_s(None, 30.0), wait_s("2m", 30.0)) == (60.0, 120.0)


def test_the_live_table_follows_the_events() -> None:
    progress = Progress({"id": "o-1"})
    event: dict[str, Any] = {"kind": "row", "node": "n-1", "state": "queued", "ended": False}
    assert progress.hear(event) == ""
    output = {"kind": "output", "node": "n-1", "seq": 1, "what": "log", "text": "hello", "fraction": -1.0}
    assert progress.hear(output) == "n-1  hello"
    assert progress.hear(output | {"what": "progress", "fraction": 0.5, "text": "half"}) == ""
    assert progress.rows["n-1"]["progress"] == 0.5
    progress.hear(event | {"state": "done", "reply": {"a": 1}, "ended": True})
    assert not progress.ended
    progress.hear({"kind": "end"})
    assert progress.ended
    for n in range(200):  # more rows than a screen has
        progress.hear({"kind": "row", "node": f"n-{n}", "state": "done", "ended": True})
    assert progress.table() is not None


@pytest.mark.parametrize(
    "words", [["job"], ["job", "run"], ["restart"], ["module"], ["nodes"], ["node", "poke"]]
)
def test_help_teaches(words: list[str]) -> None:
    shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).stdout
    assert "Usage" in shown
    if words != ["node", "poke"]:
        assert "$ instarctl" in shown
