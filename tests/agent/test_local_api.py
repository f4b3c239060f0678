"""The local API of a real agent."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys

import pytest

from instar.agent.local_api import MOST_BYTES, MOST_CONNECTIONS
from instar.wire.messages import Health
from tests.agent.fleet import NODE, VERSION, Place, Server


async def test_health_and_status(place: Place, server: Server) -> None:
    agent = await place.start()
    connection = await server.connection()
    await connection.expect(Health)  # it has had its welcome
    health = await place.ask({"v": 1, "do": "health"})
    assert health["ok"] is True
    assert (health["version"], health["digest"]) == (VERSION, place.program.digest)
    assert (health["pid"], health["release"], health["modules"]) == (agent.pid, "", {})
    assert health["connected"] is True
    assert 0 <= health["connected_for_s"] <= health["uptime_s"]
    assert health["boot_id"] == connection.hello.boot_id
    status = await place.ask({"v": 1, "do": "status"})
    assert (status["node"], status["server"]) == (NODE, f"127.0.0.1:{server.port}")
    assert status["certificate_until"] > 1_700_000_000
    mode = place.layout.socket("agent").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


async def test_look_wakes_and_reconnects(place: Place, server: Server) -> None:
    agent = await place.start()
    await server.connection()
    assert await place.ask({"v": 1, "do": "look"}) == {"ok": True}
    await agent.until_said("cannot wake the updater")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"not json\n", "bad-request"),
        (b"\xff\xfe\n", "bad-request"),
        (b"[]\n", "bad-request"),
        (b"{}\n", "bad-request"),
        (b'{"v":2,"do":"health"}\n', "bad-request"),
        (b'{"v":1,"do":"dance"}\n', "unknown-command"),
        (b'{"v":1,"do":["health"]}\n', "unknown-command"),
        (b"[" * 50_000 + b"\n", "bad-request"),
        (b"x" * (2 * MOST_BYTES), "line-too-long"),
    ],
)
async def test_bad_lines_get_an_error_and_harm_nothing(
    place: Place, server: Server, line: bytes, code: str
) -> None:
    await place.start()
    await server.connection()
    answer = await place.ask(line)
    assert answer["ok"] is False
    assert answer["error"]["code"] == code
    assert (await place.ask({"v": 1, "do": "health"}))["ok"] is True


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"do": "restart", "modules": "all"}, "bad-request"),
        ({"do": "restart", "modules": [1]}, "bad-request"),
        ({"do": "restart", "agent": "yes"}, "bad-request"),
        ({"do": "restart", "within_s": "soon"}, "bad-request"),
        ({"do": "restart", "within_s": True}, "bad-request"),
        ({"do": "restart", "within_s": 1e9}, "bad-command"),
        ({"do": "restart", "modules": ["../x"]}, "bad-module-name"),
        ({"do": "restart", "modules": ["x"] * 65}, "bad-command"),
        ({"do": "command", "id": "c-none"}, "unknown-command-id"),
        ({"do": "command"}, "unknown-command-id"),
        ({"do": "reload-module"}, "bad-module-name"),
        ({"do": "reload-module", "module": ["x"]}, "bad-module-name"),
    ],
)
async def test_restart_requests_that_cannot_be_obeyed(
    place: Place, server: Server, request_: dict[str, object], code: str
) -> None:
    await place.start()
    await server.connection()
    answer = await place.ask({"v": 1, **request_})
    assert answer["error"]["code"] == code
    assert not list(place.layout.commands.glob("*.json"))
    assert (await place.ask({"v": 1, "do": "health"}))["ok"] is True


async def test_a_restart_is_a_command_with_the_users_name_on_it(place: Place, server: Server) -> None:
    await place.start()
    await server.connection()
    assert await place.ask({"v": 1, "do": "modules"}) == {"ok": True, "modules": []}
    ordered = await place.ask({"v": 1, "do": "restart", "modules": [], "agent": False, "within_s": 5})
    async with asyncio.timeout(60):
        while True:
            status = await place.ask({"v": 1, "do": "command", "id": ordered["id"]})
            if status["status"] not in ("pending", "in-progress"):
                break
            await asyncio.sleep(0.02)
    assert (status["ok"], status["status"], status["modules"]) == (True, "success", {})
    assert (status["type"], status["origin"]) == ("restart-module", f"local:{os.geteuid()}")
    missing = await place.ask({"v": 1, "do": "restart", "modules": ["moon"]})
    async with asyncio.timeout(60):
        while (status := await place.ask({"v": 1, "do": "command", "id": missing["id"]}))[
            "status"
        ] != "failure":
            await asyncio.sleep(0.02)
    assert status["code"] == "unknown-module"


async def test_a_bad_line_keeps_the_connection(place: Place, server: Server) -> None:
    await place.start()
    await server.connection()
    reader, writer = await asyncio.open_unix_connection(place.layout.socket("agent"))
    writer.write(b'oops\n{"v":1,"do":"health"}\n')
    async with asyncio.timeout(60):
        assert json.loads(await reader.readline())["ok"] is False
        assert json.loads(await reader.readline())["ok"] is True
    writer.close()


async def test_connections_are_bounded(place: Place, server: Server) -> None:
    await place.start()
    await server.connection()
    held = [await asyncio.open_unix_connection(place.layout.socket("agent")) for _ in range(MOST_CONNECTIONS)]
    answer = await place.ask({"v": 1, "do": "health"})
    assert answer["error"]["code"] == "too-many-connections"
    for _, writer in held:
        writer.close()
    async with asyncio.timeout(60):
        while not (await place.ask({"v": 1, "do": "health"}))["ok"]:
            await asyncio.sleep(0.02)


async def test_a_socket_left_behind_is_replaced(place: Place, server: Server) -> None:
    first = await place.start()
    connection = await server.connection()
    first.process.kill()
    await first.wait()
    connection.over.set()
    assert place.layout.socket("agent").exists()
    await place.start()
    await server.connection()
    assert (await place.ask({"v": 1, "do": "health"}))["ok"] is True


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
async def test_other_users_are_refused(place: Place, server: Server) -> None:
    """The socket's mode keeps them out; here it is opened wide to show the second wall."""
    await place.start()
    await server.connection()
    path = place.layout.socket("agent")
    for folder in (path.parent, path.parent.parent, path.parent.parent.parent):
        folder.chmod(0o755)
    path.chmod(0o666)
    code = f"""
import os, socket
os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX); s.connect({str(path)!r})
s.sendall(b'{{"v":1,"do":"health"}}\\n'); print(s.recv(65536).decode())
"""
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["error"]["code"] == "not-allowed"


async def test_a_path_that_is_too_long_is_named(place: Place, server: Server) -> None:
    deep = place.layout.state / ("x" * 90)
    place.layout.state.rename(deep.parent.parent / "moved")
    moved = deep.parent.parent / "moved"
    target = moved / ("x" * 90)
    target.mkdir()
    for name in ("identity",):
        (moved / name).rename(target / name)
    place.layout.state.mkdir()
    command = place.program.command("agent", "--state", str(target))
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    async with asyncio.timeout(60):
        _, stderr = await process.communicate()
    assert process.returncode == 4
    assert b"(no-socket)" in stderr
