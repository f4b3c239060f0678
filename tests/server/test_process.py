"""The process: a clean end, a sudden one, and what is refused at the start."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from instar.core.errors import InputError
from instar_server import settings
from instar_server.main import app, initialise
from instar_server.storage import migrate
from instar_server.storage.schema import metadata
from tests.server.test_channel import eventually
from tests.server.test_history import event, send
from tests.server.world import WITHIN_S, World, running


@pytest.fixture
def own(tmp_path: Path) -> Iterator[World]:
    """A server that the test may kill."""
    with running(tmp_path) as world:
        yield world


def test_nothing_acknowledged_is_lost_when_killed(own: World) -> None:
    """Kill it in the middle of acknowledging, several times; every acknowledged event is there afterwards."""
    own.publish("1.0.0")
    node = own.new_node()
    own.want("group", "default", "1.0.0")
    acknowledged: list[str] = []
    for round_ in range(2):
        stop = threading.Event()

        def tell(round_: int = round_, stop: threading.Event = stop) -> None:
            n = 0
            with node.http() as http:
                while not stop.is_set():
                    n += 1
                    body = {"v": 1, "events": [event(f"t{round_}", n, "staged")]}
                    try:
                        acknowledged.extend(http.post("/v1/node/events", json=body).json()["stored"])
                    except httpx.TransportError:
                        return

        before, until = len(acknowledged), time.monotonic() + WITHIN_S
        teller = threading.Thread(target=tell)
        teller.start()
        while len(acknowledged) < before + 10:
            assert time.monotonic() < until
            time.sleep(0.01)
        own.kill()
        stop.set()
        teller.join(WITHIN_S)
        own.start()
    assert len(acknowledged) >= 20
    with own.api() as api:
        found = api.get(f"/nodes/{node.id}/history", params={"limit": 1000}).json()
        assert api.get("/releases").json()["releases"][0]["version"] == "1.0.0"
    assert found["whole"] is True
    assert set(acknowledged) <= {entry["id"] for entry in found["entries"]}
    with node.http() as http:
        assert http.get("/v1/node/wanted").json()["lines"]["agent"]["version"] == "1.0.0"
    assert own.stop() == 0


async def test_sigterm_tells_the_nodes_answers_who_waits_and_exits_with_0(own: World) -> None:
    node = await asyncio.to_thread(own.new_node)
    async with node.connected() as channel:
        with node.http(f"updater 1.1.0 {'a' * 96}") as http:
            query = {"line": "agent", "phase": "trial", "tx": "t", "digest": "0" * 96, "wait_s": 20}
            question = asyncio.create_task(asyncio.to_thread(http.get, "/v1/node/verdict", params=query))
            await eventually(lambda: own.node(node.id)["updater"]["version"] == "1.1.0")  # it was asked
            started = time.monotonic()
            stopped = asyncio.create_task(asyncio.to_thread(own.stop))
            refused = await channel.read_type("refused")
            assert refused["code"] == "server-stopping"
            assert 0 < refused["retry_after_s"] < 120
            assert (await channel.read())["t"] == "closed"
            assert (await question).json()["verdict"] == "wait"
        assert await stopped == 0
        assert time.monotonic() - started < 18
    assert not own.layout.ports.exists()
    log = (own.folder / "server.log").read_text()
    assert "Traceback" not in log, log
    await asyncio.to_thread(own.start)
    try:
        seen = await asyncio.to_thread(own.node, node.id)
        assert seen["agent"]["version"] == "1.0.0"  # written before the end
        assert seen["state"] == "offline"
        assert send(node, event("t", 1, "staged")).status_code == 200
    finally:
        own.kill()


def test_what_cannot_start_says_why_and_ends(tmp_path: Path) -> None:
    with running(tmp_path) as world:
        assert refusal(world.layout) == (4, "repository-in-use")
        world.stop()
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            assert refusal(world.layout, "--gateway-port", port) == (4, "cannot-listen")
            assert refusal(world.layout, "--api-port", port) == (4, "cannot-listen")
        assert not world.layout.ports.exists()
        world.start()  # what failed left nothing open
        assert world.stop() == 0
    assert refusal(settings.Layout(tmp_path / "nowhere")) == (2, "not-initialised")


def refusal(layout: settings.Layout, *words: str) -> tuple[int, str]:
    """Exit status and code of a server that cannot start."""
    done = CliRunner().invoke(app, ["run", "--data", str(layout.data), *words])
    assert done.stderr.startswith("instar-server: cannot "), done.output
    return done.exit_code, done.stderr.rpartition("[")[2].rstrip("]\n")


def test_the_folder_is_private_and_init_overwrites_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    for path in (
        world.layout.ca / "key.pem",
        world.layout.admin_token,
        world.layout.certificate,
        world.layout.database,
    ):
        assert path.stat().st_mode & 0o077 == 0, path
    assert world.layout.admin_token.read_text().strip() == world.admin
    assert world.admin.encode() not in world.layout.database.read_bytes()
    with pytest.raises(InputError, match="exists"):
        initialise(world.layout, settings.load(world.layout), tmp_path / "root.json", tmp_path / "online")


@pytest.mark.parametrize(
    "values",
    [
        {"gateway_port": -1}, {"gateway_port": "x"}, {"ping_s": 0}, {"nonsense": 1}, {"hosts": []},
        {"insecure_http": True, "bind": "0.0.0.0"}, {"ping_s": True},
    ],
)  # fmt: skip
def test_bad_settings_are_named(values: dict[str, object]) -> None:
    with pytest.raises(InputError, match="cannot use the test"):
        settings.check(dict(values), "the test")


def test_settings_survive_a_round(tmp_path: Path) -> None:
    layout = settings.Layout(tmp_path)
    wanted = settings.check(
        {"hosts": ['a"b', "::1"], "ping_s": 5, "public_gateway": "https://x:1"}, "the test"
    )
    settings.save(layout, wanted)
    assert settings.load(layout) == wanted
    assert settings.load(layout, gateway_port=0, api_port=None).gateway_port == 0


def test_the_migrations_make_the_schema_that_the_code_knows(tmp_path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from sqlalchemy import create_engine

    path = tmp_path / "fresh.db"
    migrate.upgrade(path)
    assert (
        migrate.current(path)
        == ScriptDirectory(str(Path(migrate.__file__).with_name("migrations"))).get_current_head()
    )
    migrate.upgrade(path)  # again is no error
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_the_api_over_plain_http_on_loopback_only(tmp_path: Path) -> None:
    with running(tmp_path, insecure_http=True) as world:
        assert world.ports["api"].startswith("http://")
        assert (
            httpx.get(f"{world.ports['api']}/api/v1/ready", trust_env=False, timeout=60).json()["ok"] is True
        )
        assert os.path.exists(world.layout.ports)
        assert world.stop() == 0


def test_what_there_is_survives_the_migration_to_orders(tmp_path: Path) -> None:
    """Tables are copied in it: rows, keys, and the numbers of events stay as they were."""
    path = tmp_path / "old.db"
    migrate.upgrade(path, "0002")
    with sqlite3.connect(path) as database:
        database.execute("INSERT INTO groups VALUES ('g', 1)")
        for n in range(3):
            database.execute(
                "INSERT INTO nodes (id, group_name, enrolled, enrol_key, token, tx_line, facts)"
                " VALUES (?, 'g', 1, ?, 't', 'agent', '{\"a\": 1}')",
                (f"n-{n}", f"k{n}"),
            )
            values = (f"n-{n}", n + 1, f"t:{n}", "h" * 64)
            database.execute(
                "INSERT INTO events (node, n, source, id, tx, line, phase, version, digest, from_version,"
                " reason_code, reason_text, wall, boot_id, stored_at, hash)"
                " VALUES (?, ?, 'node', ?, 't', 'agent', 'trial', '1', 'd', '', '', '', 1, '', 1, ?)",
                values,
            )
        database.execute("DELETE FROM events WHERE n = 3")
        database.execute("INSERT INTO wishes VALUES ('group', 'g', 'agent', '1', 't', 'd', 5, 1, 'me')")
        tables = ("nodes", "events", "wishes")
        before = {table: database.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in tables}
    migrate.upgrade(path)
    with sqlite3.connect(path) as database:
        after = {table: database.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in tables}
        assert after["events"] == [(*row, 0, "", "") for row in before["events"]]
        assert after["wishes"] == [(*row, "pull") for row in before["wishes"]]
        assert [row[: len(before["nodes"][0])] for row in after["nodes"]] == before["nodes"]
        width = len(before["nodes"][0])
        assert [row[width : width + 6] for row in after["nodes"]] == [("", 0, "", None, None, 0)] * 3
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        line = "module/" + "x" * 31 + ".y"
        database.execute("UPDATE events SET line = ?", (line,))
        last = "INSERT INTO events SELECT NULL, node, 9, source, 'z', tx, line, phase, version, digest,"
        last += (
            " from_version, reason_code, reason_text, wall, boot_id, stored_at, hash, 0, '', ''"
            " FROM events WHERE n = 1"
        )
        database.execute(last)
        assert database.execute("SELECT max(seq) FROM events").fetchone() == (4,)  # 3 is never given again
