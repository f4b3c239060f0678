"""Service modules of a real agent: placed on the disk, run by its runner, restarted, killed, found again."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from instar.core.releases import Release
from instar.host.layout import Layout
from instar.host.line import Line
from instar.trust.manifest import FileEntry
from instar.trust.module import ModuleManifest, Timeouts, module_digest
from instar.wire.messages import Ack, Command, CommandStatus, Health, Job, Result, Taken
from instar_lab import machine
from instar_lab.program import build, variants
from tests.agent.fleet import VERSION, Agent, Connection, Place, Server
from tests.agent.spawning import is_gone, until_gone

SOURCE = """
STATE = {}
def start(context):
    STATE.update(context.load() or {"starts": 0, "count": 0})
    STATE["starts"] += 1
    context.save(STATE)
def request(args, context):
    STATE["count"] += args.get("add", 0)
    return {"version": context.version, **STATE}
def stop(context):
    STATE["stopped"] = STATE["starts"]
    context.save(STATE)
"""
WITHIN_S = 60.0


def put(
    layout: Layout, name: str, version: str = "1.0.0", source: str = SOURCE, depends: tuple[str, ...] = ()
) -> str:
    """Place a service module as the updater would, and point `current` to it; its digest."""
    code = source.encode()
    entry = FileEntry("run.py", len(code), hashlib.sha256(code).hexdigest(), "0644")
    timeouts = Timeouts(ready_s=60.0, stop_s=20.0)
    manifest = ModuleManifest(
        name, version, "python", "service", {"any": "run.py"}, (entry,),
        stateful=True, depends=depends, timeouts=timeouts,
    )  # fmt: skip
    data = manifest.encode()
    release = Release(version, module_digest(data)).name
    line = Line(layout.module(name))
    folder = line.folder(release)
    folder.mkdir(parents=True)
    (folder / "run.py").write_bytes(code)
    (folder / "manifest.json").write_bytes(data)
    line.mark_valid(release)
    line.activate(release, line.current())
    return module_digest(data)


def kept(place: Place, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place.layout.module(name).data / "state.json").read_bytes())
    return found


async def told(connection: Connection, **states: str) -> Health:
    """The first health that says so."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            health = await connection.expect(Health, WITHIN_S)
            if health.modules == states:
                return health


async def rows(place: Place) -> dict[str, dict[str, Any]]:
    answer = await place.ask({"v": 1, "do": "modules"})
    return {row["name"]: row for row in answer["modules"]}


async def ask(connection: Connection, number: int, module: str, **args: Any) -> dict[str, Any]:
    await connection.send(Job(f"j-{number}", module, args=args, deadline_s=60.0))
    result = await connection.expect(Result, WITHIN_S)
    assert result.ok, result
    return result.reply


async def until(connection: Connection, command_id: str, *statuses: str) -> CommandStatus:
    async with asyncio.timeout(WITHIN_S):
        while True:
            status = await connection.expect(CommandStatus, WITHIN_S)
            if status.id == command_id and status.status in statuses:
                return status


async def cli(place: Place, *words: str) -> tuple[int, str, str]:
    command = [*place.program.command(words[0], *words[1:]), "--state", str(place.layout.state)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    async with asyncio.timeout(120):
        out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_placed_started_asked_and_stopped(place: Place, server: Server) -> None:
    digest = put(place.layout, "counter")
    agent = await place.start()
    connection = await server.connection()
    health = await told(connection, counter="ok")
    assert health.digests == {"counter": digest}
    local = await place.ask({"v": 1, "do": "health"})
    row = (await rows(place))["counter"]
    assert local["modules"] == {"counter": "ok"}
    assert local["digests"] == {"counter": digest}
    assert local["pids"] == {"counter": row["pid"]}
    assert (await ask(connection, 1, "counter", add=5))["count"] == 5
    agent.process.terminate()
    assert await agent.wait() == 0
    assert is_gone(row["pid"])
    assert kept(place, "counter") == {"starts": 1, "count": 5, "stopped": 1}
    assert "all modules have stopped" in agent.said()


async def test_one_and_all_are_restarted_from_the_command_line(place: Place, server: Server) -> None:
    put(place.layout, "low")
    put(place.layout, "high", depends=("low",))
    put(place.layout, "other")
    agent = await place.start()
    connection = await server.connection()
    await told(connection, low="ok", high="ok", other="ok")
    before = await rows(place)
    status, out, err = await cli(place, "restart", "--module", "other")
    assert status == 0, err
    assert [line.split()[1] for line in out.splitlines()][-2:] == ["success", "running"]
    after = await rows(place)
    assert [after[n]["pid"] == before[n]["pid"] for n in ("low", "high", "other")] == [True, True, False]
    assert kept(place, "other")["stopped"] == 1
    assert after["other"]["restarts"] == 0
    status, out, _ = await cli(place, "restart", "--module", "low", "--json")
    answer = json.loads(out)
    assert (status, answer["status"], answer["origin"]) == (0, "success", f"local:{os.geteuid()}")
    assert answer["modules"] == {"low": "running", "high": "running"}
    status, out, _ = await cli(place, "modules")
    assert status == 0
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [
        [name, "1.0.0", "ready"] for name in ("high", "low", "other")
    ]
    status, _, err = await cli(place, "restart", "--module", "moon")
    assert status == 2
    assert "(unknown-module)" in err
    assert agent.said().count(f"asked by local:{os.geteuid()}, ended after") == 2
    assert "-> failed" not in agent.said()


async def test_the_servers_restart_is_told_until_it_is_acknowledged(place: Place, server: Server) -> None:
    put(place.layout, "counter")
    await place.start()
    connection = await server.connection()
    await told(connection, counter="ok")
    command = Command("c-7", "restart-module", ["counter"], "server:t-1")
    await connection.send(command)
    assert (await connection.expect(Taken)).id == "c-7"
    await until(connection, "c-7", "in-progress")
    end = await until(connection, "c-7", "success", "failure", "timeout")
    assert (end.status, end.modules, end.origin) == ("success", {"counter": "running"}, "server:t-1")
    await connection.cut()
    again = await server.connection()
    assert (await until(again, "c-7", "success")).modules == {"counter": "running"}
    await again.send(Ack("c-7"))
    await again.send(command)
    await until(again, "c-7", "success")
    assert kept(place, "counter")["starts"] == 2  # not once more


async def test_a_killed_module_comes_back_with_its_state(place: Place, server: Server) -> None:
    put(place.layout, "counter")
    await place.start()
    connection = await server.connection()
    await told(connection, counter="ok")
    await ask(connection, 1, "counter", add=3)
    pid = (await rows(place))["counter"]["pid"]
    os.kill(pid, signal.SIGKILL)
    await told(connection, counter="failed")
    await told(connection, counter="ok")
    row = (await rows(place))["counter"]
    assert (row["restarts"], row["signal"]) == (1, signal.SIGKILL)
    reply = await ask(connection, 2, "counter")
    assert (reply["starts"], reply["count"]) == (2, 0)  # what it had saved; it saves when it stops


async def test_a_killed_agents_modules_end_and_the_next_agent_starts_them_again(
    place: Place, server: Server
) -> None:
    put(place.layout, "counter")
    first = await place.start()
    connection = await server.connection()
    await told(connection, counter="ok")
    await ask(connection, 1, "counter", add=3)
    pid = (await rows(place))["counter"]["pid"]
    first.process.kill()
    await first.wait()
    connection.over.set()
    await place.start()
    again = await server.connection()
    await told(again, counter="ok")
    assert is_gone(pid)
    reply = await ask(again, 2, "counter")
    assert (reply["starts"], reply["count"], reply["stopped"]) == (2, 3, 1)


async def test_a_module_that_cannot_be_loaded_is_told(place: Place, server: Server) -> None:
    put(place.layout, "broken", source="import nothing_of_this_name\n")
    await place.start()
    connection = await server.connection()
    await told(connection, broken="failed")
    row = (await rows(place))["broken"]
    assert "nothing_of_this_name" in row["error"]
    assert row["exit_code"] != 0


async def test_reload_replaces_what_runs(place: Place, server: Server) -> None:
    await place.start()
    connection = await server.connection()
    put(place.layout, "counter")
    assert await place.ask({"v": 1, "do": "reload-module", "module": "counter"}) == {"ok": True}
    await told(connection, counter="ok")
    new = put(place.layout, "counter", "1.1.0")
    assert await place.ask({"v": 1, "do": "reload-module", "module": "counter"}) == {"ok": True}
    async with asyncio.timeout(WITHIN_S):
        while (await told(connection, counter="ok")).digests != {"counter": new}:
            pass
    assert (await ask(connection, 1, "counter"))["version"] == "1.1.0"
    os.unlink(place.layout.module("counter").current)
    await place.ask({"v": 1, "do": "reload-module", "module": "counter"})
    await told(connection)
    refused = await place.ask({"v": 1, "do": "reload-module", "module": "../x"})
    assert refused["error"]["code"] == "bad-module-name"


async def test_changes_in_a_row_are_told_a_few_times_a_second(place: Place, server: Server) -> None:
    for number in range(6):
        put(place.layout, f"m{number}")
    await place.start()
    connection = await server.connection()
    names = {f"m{number}": "ok" for number in range(6)}
    await told(connection, **names)
    await asyncio.sleep(0.5)
    began, count = time.monotonic(), 0
    await connection.send(Command("c-1", "restart-module"))
    while True:
        message = await connection.expect((Health, CommandStatus))  # type: ignore[arg-type]
        if isinstance(message, CommandStatus) and message.status == "success":
            break
        count += isinstance(message, Health)
    assert count <= (time.monotonic() - began) * 5 + 2


# --- the agent itself


@pytest.fixture
async def installed(place: Place) -> AsyncIterator[Place]:
    """A node with a launcher and an agent's release, as `install` leaves it."""
    layout = place.layout
    layout.launcher.parent.mkdir(parents=True)
    shutil.copy(place.program.path, layout.launcher)
    release_of(place, build.build(VERSION))
    layout.run.mkdir(mode=0o700)
    yield place
    await asyncio.to_thread(machine.end_all_naming, layout.state, 0.0)


def release_of(place: Place, program: build.Program) -> None:
    release = Release(VERSION, program.digest).name
    line = Line(place.layout.line("agent"))
    folder = line.folder(release)
    folder.mkdir(parents=True)
    build.write(program, folder / "instar.pyz")
    sha256 = hashlib.sha256((folder / "instar.pyz").read_bytes()).hexdigest()
    files = [{"path": "instar.pyz", "size": 0, "sha256": sha256, "mode": "0755"}]
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    line.mark_valid(release)
    line.activate(release, "")


async def launch(place: Place) -> Agent:
    """Start the agent by hand, as somebody without a service manager does."""
    log = place.layout.state / f"log-{len(place.started)}"
    words = place.program.command("launch", "agent", "--state", str(place.layout.state))
    with log.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            *words, stdin=subprocess.DEVNULL, stderr=file, stdout=file
        )
    place.started.append(Agent(process, log))
    return place.started[-1]


async def test_an_agent_started_by_hand_is_replaced_by_its_own_child(
    installed: Place, server: Server
) -> None:
    put(installed.layout, "counter")
    old = await launch(installed)
    connection = await server.connection()
    await told(connection, counter="ok")
    await ask(connection, 1, "counter", add=3)
    waiting = asyncio.create_task(cli(installed, "restart"))
    again = await server.connection(WITHIN_S)
    status, out, err = await waiting
    assert status == 0, err + old.said()
    words = [line.split()[1] for line in out.splitlines()]
    assert words[-3:] == ["in-progress", "success", "running"]
    assert await old.wait() == 0
    await told(again, counter="ok")
    reply = await ask(again, 2, "counter")
    assert (reply["starts"], reply["count"], reply["stopped"]) == (2, 3, 1)
    health = await installed.ask({"v": 1, "do": "health"})
    assert health["pid"] == again.hello.pid != old.pid
    who = f"local:{os.geteuid()}"
    assert f"restart of the agent begins, asked by {who}" in old.said()
    await old.until_said(f"restart of the agent, asked by {who}")  # its log goes on in the same file
    connection.over.set()


async def test_the_servers_restart_of_the_agent_gets_its_end_from_the_next_one(
    installed: Place, server: Server
) -> None:
    put(installed.layout, "counter")
    await launch(installed)
    connection = await server.connection()
    await told(connection, counter="ok")
    await connection.send(Command("c-1", "restart-agent", origin="server:t-9"))
    await until(connection, "c-1", "in-progress")
    again = await server.connection(WITHIN_S)
    connection.over.set()
    end = await until(again, "c-1", "success", "failure", "timeout")
    assert (end.status, end.modules, end.origin) == ("success", {"counter": "running"}, "server:t-9")
    assert again.hello.pid != connection.hello.pid


async def test_one_that_nobody_restarts_replaces_itself(installed: Place, server: Server) -> None:
    """Somebody else's lock keeps the child from its turn; the agent becomes the launcher."""
    agent = await launch(installed)
    connection = await server.connection()
    with (installed.layout.run / "start-agent.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        await connection.send(Command("c-1", "restart-agent"))
        await until(connection, "c-1", "in-progress")
        again = await server.connection(WITHIN_S)
        connection.over.set()
        end = await until(again, "c-1", "success", "failure", "timeout")
    assert end.status == "success"
    assert again.hello.pid == agent.pid
    assert again.hello.started > connection.hello.started
    assert "it leaves by itself" in agent.said()


KILLED_AT = ("command:received", "command:in-progress", "command:stopped", "command:ended")


@pytest.mark.parametrize("kind", ["restart-module", "restart-agent"])
@pytest.mark.parametrize("point", KILLED_AT)
async def test_killed_on_the_way_it_still_gets_one_end(
    installed: Place, server: Server, tmp_path: Path, point: str, kind: str
) -> None:
    """Nobody keeps this agent: the test starts the next one, where the child of the first did not."""
    put(installed.layout, "counter")
    program = tmp_path / "killed-at.pyz"
    killed_at = variants.variant("killed-at", VERSION)
    build.write(killed_at, program)
    release_of(installed, killed_at)  # what a child of it runs
    plan = {"kills": [{"role": "agent", "point": point, "count": 1}]}
    (installed.layout.state / "lab-kill-plan.json").write_text(json.dumps(plan))
    first = await installed.start(program=program)
    connection = await server.connection()
    await told(connection, counter="ok")
    pid = (await rows(installed))["counter"]["pid"]
    command = Command("c-1", kind, [], "server:t-1")
    await connection.send(command)
    assert await first.wait(WITHIN_S) in (-signal.SIGKILL, 0)  # 0: it was stopped, and the next one is killed
    connection.over.set()
    if first.process.returncode == 0:  # the next one may be killed before it has called
        state = installed.layout.state
        await asyncio.to_thread(machine.wait_for, lambda: not machine.naming(state), "its end", WITHIN_S)
    second = await installed.start(program=program)
    while (again := await server.connection(WITHIN_S)).hello.pid != second.pid:
        again.over.set()
    if kind == "restart-agent" and point == "command:received":  # it had not begun: this agent does it
        await again.gone(WITHIN_S)
        again = await server.connection(WITHIN_S)
    await again.send(command)  # the server repeats what it has no end of
    end = await until(again, "c-1", "success", "failure", "timeout")
    assert (end.status, end.modules) == ("success", {"counter": "running"})
    await until_gone(pid)
    async with asyncio.timeout(WITHIN_S):
        while (await rows(installed))["counter"]["state"] != "ok":
            await asyncio.sleep(0.05)
    counted = kept(installed, "counter")
    assert counted["stopped"] == counted["starts"] - 1  # each stop was a clean one
    assert (
        installed.layout.state / "lab-kill-plan.json.done"
    ).stat().st_size == 1  # it was killed there, once
    assert not list(installed.layout.commands.glob("*.unreadable"))
