"""The control channel of a real agent process against a server over real TLS."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path

import pytest

from instar.agent.channel import Channel
from instar.agent.link import Link
from instar.core.backoff import Backoff
from instar.core.errors import ServerUnreachable
from instar.wire.messages import (
    MAX_FRAME,
    Ack,
    Cancel,
    Command,
    CommandStatus,
    Error,
    Health,
    Hello,
    Job,
    Look,
    Message,
    Output,
    Ping,
    Pong,
    Refused,
    Result,
    Taken,
    Welcome,
)
from tests.agent import shelving
from tests.agent.fleet import NODE, VERSION, Connection, Place, Server

NONCE = "0123456789abcdef" * 2
TEST_JOB = Job("j-1", "selftest", args={"nonce": NONCE})


async def alive(connection: Connection, n: int) -> None:
    """The connection still answers."""
    await connection.send(Ping(n))
    while (await connection.expect(Pong)).n != n:
        pass


async def test_says_hello_and_reports_health(place: Place, server: Server) -> None:
    agent = await place.start()
    connection = await server.connection()
    hello = connection.hello
    assert (hello.role, hello.node, hello.version, hello.pid) == ("agent", NODE, VERSION, agent.pid)
    assert (hello.digest, hello.tx) == (place.program.digest, "")
    assert connection.headers["Instar-Program"] == f"agent {VERSION} {place.program.digest}"
    assert (await connection.expect(Health)).ok


@pytest.mark.parametrize(("named", "expected"), [("this", "tx-7"), ("another", "")])
async def test_names_the_trial_of_its_own_release_only(
    place: Place, server: Server, named: str, expected: str
) -> None:
    release = f"{VERSION}-{place.program.digest[:12]}"
    path = place.layout.line("agent").releases / release / "instar.pyz"
    path.parent.mkdir(parents=True)
    path.write_bytes(place.program.path.read_bytes())
    record = {"v": 1, "tx": "tx-7", "release": release if named == "this" else "9.9.9-000000000000"}
    place.layout.line("agent").trial.write_text(json.dumps(record))
    await place.start(program=path)
    assert (await server.connection()).hello.tx == expected


async def test_job_runs_once_and_its_result_is_sent_until_acknowledged(place: Place, server: Server) -> None:
    await place.start()
    first = await server.connection()
    await first.send(TEST_JOB)
    result = await first.expect(Result)
    assert result.ok, result.reason
    assert (result.reply["nonce"], result.reply["digest"]) == (NONCE, place.program.digest)
    assert result.max_rss > 1 << 20
    await first.send(TEST_JOB)  # a repeat: the same run's result again
    assert (await first.expect(Result)) == result
    await first.cut()

    second = await server.connection()
    assert (await second.expect(Result)) == result
    await second.send(Ack("j-1"))
    await alive(second, 1)
    await second.cut()

    third = await server.connection()
    await third.send(TEST_JOB)  # long done: nothing is run, nothing is sent
    with pytest.raises(TimeoutError):
        await third.expect(Result, within_s=0.7)


async def test_result_survives_the_death_of_the_agent(place: Place, server: Server) -> None:
    agent = await place.start()
    connection = await server.connection()
    await connection.send(TEST_JOB)
    result = await connection.expect(Result)
    agent.process.kill()
    await agent.wait()
    connection.over.set()
    await place.start()
    assert (await (await server.connection()).expect(Result)) == result


async def test_look_wakes_the_updater(place: Place, server: Server) -> None:
    asked: asyncio.Queue[object] = asyncio.Queue()

    async def updater(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.put_nowait(json.loads(await reader.readline()))
        writer.write(b'{"ok": true}\n')
        await writer.drain()
        writer.close()

    place.layout.run.mkdir()
    listener = await asyncio.start_unix_server(updater, place.layout.socket("updater"))
    await place.start()
    connection = await server.connection()
    await connection.send(Look("wanted"))
    async with asyncio.timeout(60):
        assert await asked.get() == {"v": 1, "do": "look"}
    listener.close()


async def test_absent_updater_is_mentioned_once(place: Place, server: Server) -> None:
    agent = await place.start()
    connection = await server.connection()
    for number in range(3):
        await connection.send(Look())
        await alive(connection, number)
        await asyncio.sleep(0.05)
    await agent.until_said("cannot wake the updater")
    assert agent.said().count("cannot wake the updater") == 1


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("{not json", "not-json"),
        ('{"t": "dance"}', "unknown-type"),
        ('{"t": "ack"}', "missing-field"),
        ('{"t": "ack", "id": 7}', "wrong-type"),
        ('{"t": "job", "id": "../x", "module": "selftest"}', "bad-job-id"),
        ('{"t": "job", "id": "j", "module": "selftest", "purpose": "fun"}', "bad-purpose"),
        ('{"t": "result", "id": "j", "ok": true}', "unexpected-type"),
        (json.dumps({"t": "look", "reason": "x" * MAX_FRAME}), "frame-too-large"),
    ],
)
async def test_a_bad_frame_is_answered_and_the_connection_stays(
    place: Place, server: Server, frame: str, code: str
) -> None:
    await place.start()
    connection = await server.connection()
    await connection.send_raw(frame)
    assert (await connection.expect(Error)).code == code
    await alive(connection, 5)


async def test_unknown_fields_are_ignored(place: Place, server: Server) -> None:
    await place.start()
    connection = await server.connection()
    await connection.send_raw('{"t": "ping", "n": 3, "since": "2.0"}')
    assert (await connection.expect(Pong)).n == 3


async def test_stays_away_as_long_as_it_was_told(place: Place, server: Server) -> None:
    agent = await place.start()
    connection = await server.connection()
    told = time.monotonic()
    await connection.send(Refused("draining", "come back later", retry_after_s=1.5))
    connection.over.set()
    await server.connection()
    assert server.attempts[-1] - told >= 1.5
    assert "come back later" in agent.said()


async def test_http_refusal_is_said_and_obeyed(place: Place, server: Server) -> None:
    body = {"error": {"code": "revoked", "message": "cannot connect: this node was revoked"}}
    server.reject = (403, body, {"Retry-After": "2"})
    agent = await place.start()
    await agent.until_said("this node was revoked (revoked)")
    server.reject = None
    await server.connection()
    assert server.attempts[1] - server.attempts[0] >= 2.0


async def test_waits_grow_while_the_server_is_away(place: Place, server: Server, tmp_path: Path) -> None:
    agent = await place.start()
    connection = await server.connection()
    connection.over.set()
    port = server.port
    await server.stop()
    waits: list[float] = []
    async with asyncio.timeout(60):
        while len(waits) < 3:
            await asyncio.sleep(0.05)
            waits = [float(wait) for wait in re.findall(r"next try in ([0-9.]+) s", agent.said())]
    assert "cannot reach 127.0.0.1" in agent.said()
    for n, wait in enumerate(waits):  # floor 0.5 s, doubled, with jitter: half of it, up to twice as much
        assert max(0.5, 0.25 * 2**n) - 0.06 <= wait <= 2**n + 0.06, waits
    await server.start(tmp_path, port)
    await server.connection()


async def test_pings_as_often_as_it_was_told(place: Place, server: Server) -> None:
    server.welcome = Welcome(1, "test", ping_s=0.2, health_s=30.0)
    await place.start()
    connection = await server.connection()
    assert [(await connection.expect(Ping)).n for _ in range(3)] == [1, 2, 3]


async def test_waits_for_its_welcome_and_says_what_the_server_said(place: Place, server: Server) -> None:
    server.welcome = None
    agent = await place.start()
    connection = await server.connection()
    await connection.send(Error("bad-hello", "cannot read hello: expected role, got none"))
    await agent.until_said("cannot read hello")
    assert (await place.ask({"v": 1, "do": "health"}))["connected"] is False
    await connection.send(Welcome(1, "test", ping_s=5.0, health_s=30.0))
    await connection.expect(Health)
    assert (await place.ask({"v": 1, "do": "health"}))["connected"] is True


async def test_leaves_at_once_when_stopped(place: Place, server: Server) -> None:
    """It waits for nobody's answer. The best of three: the machine may be busy with something else."""
    took = []
    for _ in range(3):
        agent = await place.start()
        connection = await server.connection()
        await connection.expect(Health)
        began = time.monotonic()
        agent.process.terminate()
        assert await connection.gone() == 1000
        assert await agent.wait() == 0
        took.append(time.monotonic() - began)
        assert not place.layout.socket("agent").exists()
    print(f"stopped within {min(took):.3f} s")
    assert min(took) < 5.0


async def test_stops_while_the_server_is_away(place: Place, server: Server) -> None:
    await server.stop()
    agent = await place.start()
    await agent.until_said("next try in")
    agent.process.terminate()
    assert await agent.wait() == 0


async def test_stops_in_the_middle_of_a_long_wait(place: Place, server: Server) -> None:
    server.reject = (503, {"error": {"code": "busy", "message": "not now"}}, {"Retry-After": "600"})
    agent = await place.start()
    await agent.until_said("next try in 6")
    agent.process.terminate()
    assert await agent.wait() == 0
    assert len(server.attempts) == 1


async def test_a_second_agent_waits_for_the_lock_and_gives_up(place: Place, server: Server) -> None:
    await place.start()
    await server.connection()
    second = await place.start("--lock-within", "0.3")
    assert await second.wait() == 4
    assert "another process holds it (lock-held)" in second.said()


async def test_lapsed_certificate_does_not_stop_the_start(place: Place, server: Server) -> None:
    certificate, key = place.authority.issue([], life_s=10, age_s=3600)
    place.layout.certificate.write_bytes(certificate)
    place.layout.key.write_bytes(key)
    server.renews = False
    agent = await place.start()
    await agent.until_said("next try in")
    assert (await place.ask({"v": 1, "do": "status"}))["connected"] is False


async def test_not_enrolled_is_said(place: Place) -> None:
    place.layout.node.unlink()
    agent = await place.start()
    assert await agent.wait() == 4
    assert "not-enrolled" in agent.said()


async def test_through_a_proxy(place: Place, server: Server) -> None:
    seen: list[bytes] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        out_reader, out_writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"HTTP/1.1 200 ok\r\n\r\n")
        await asyncio.gather(pump(reader, out_writer), pump(out_reader, writer), return_exceptions=True)

    listener = await asyncio.start_server(proxy, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    place.layout.config.write_text(f'[network]\nproxy = "http://me:secret@127.0.0.1:{port}"\n')
    agent = await place.start()
    connection = await server.connection()
    assert isinstance(connection.hello, Hello)
    assert seen[0].startswith(f"CONNECT 127.0.0.1:{server.port} HTTP/1.1\r\n".encode())
    assert b"Proxy-Authorization: Basic bWU6c2VjcmV0\r\n" in seen[0]
    assert "secret" not in agent.said()
    agent.process.terminate()
    await agent.wait()
    listener.close()


async def test_a_name_is_looked_up(place: Place, server: Server) -> None:
    place.enrol(server.port, host="localhost")
    await place.start()
    await server.connection()


# --- jobs and commands


async def test_a_job_is_taken_and_speaks_while_it_runs(place: Place, server: Server) -> None:
    code = """
import time
def run(args, context):
    context.log("begun")
    context.progress(0.5, "half")
    time.sleep(args["sleep"])
    return {"slept": args["sleep"]}
"""
    made = shelving.write(place.layout.state, "test.talker", code=code)
    await place.start()
    connection = await server.connection()
    job = Job("j-9", "test.talker", args={"sleep": 0.3}, version=made.version, digest=made.digest)
    await connection.send(job)
    assert (await connection.expect(Taken)).id == "j-9"
    said = [await connection.expect(Output) for _ in range(2)]
    assert [(each.id, each.seq) for each in said] == [("j-9", 1), ("j-9", 2)]
    assert {(each.kind, each.text, each.fraction) for each in said} == {
        ("log", "begun", -1.0),
        ("progress", "half", 0.5),
    }
    result = await connection.expect(Result)
    assert (result.ok, result.reply) == (True, {"slept": 0.3})
    await connection.send(job)
    assert await connection.expect(Result) == result


async def test_a_job_is_cancelled(place: Place, server: Server) -> None:
    made = shelving.write(
        place.layout.state,
        "test.sleeper",
        code="import time\ndef run(args, context): context.log('begun'); time.sleep(600)\n",
    )
    await place.start()
    connection = await server.connection()
    await connection.send(Job("j-9", "test.sleeper", version=made.version, digest=made.digest))
    await connection.expect(Taken)
    assert (await connection.expect(Output)).text == "begun"
    await connection.send(Cancel("j-9"))
    result = await connection.expect(Result)
    assert (result.id, result.code, result.signal) == ("j-9", "cancelled", 9)
    await connection.send(Cancel("../x"))
    assert (await connection.expect(Error)).code == "bad-job-id"
    await alive(connection, 7)


async def test_a_command_that_nobody_can_obey_is_answered(place: Place, server: Server) -> None:
    await place.start()
    connection = await server.connection()
    await connection.send(Command("../x", "restart-module"))
    assert (await connection.expect(Error)).code
    await alive(connection, 7)


async def test_a_command_is_taken_and_its_end_is_told(place: Place, server: Server) -> None:
    await place.start()
    connection = await server.connection()
    await connection.send(Command("c-1", "restart-module", origin="server:t-1"))
    assert (await connection.expect(Taken)).id == "c-1"
    while (status := await connection.expect(CommandStatus)).status in ("pending", "in-progress"):
        pass
    assert (status.id, status.origin) == ("c-1", "server:t-1")
    await connection.send(Ack("c-1"))
    await alive(connection, 7)


# --- poked


class Deaf:
    """A link to a server that takes all and says nothing after its welcome."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.broken = asyncio.Event()
        self.greeted = False

    def send(self, message: Message) -> None:
        self.sent.append(message)

    async def receive(self, within_s: float) -> list[Message]:
        if not self.greeted:
            self.greeted = True
            return [Welcome(1, "test", ping_s=300.0, health_s=300.0)]
        try:
            async with asyncio.timeout(min(within_s, 0.05)):
                await self.broken.wait()
        except TimeoutError:
            return []
        raise ServerUnreachable("connection-lost", "cannot go on: it was cut")

    def cut(self) -> None:
        self.broken.set()

    async def close(self) -> None:
        pass


class Quiet:
    """Duties of which nothing comes."""

    def hello(self) -> Hello:
        return Hello(1, "agent", NODE, VERSION, "0" * 96, "b", 1, 0.0)

    def health(self) -> Health:
        return Health(True)

    def welcomed(self) -> None: ...
    def look(self, reason: str) -> None: ...
    def job(self, job: Job) -> None: ...
    def cancel(self, job_id: str) -> None: ...
    def command(self, command: Command) -> None: ...
    def acknowledged(self, item_id: str) -> None: ...


async def test_poked_it_pings_at_once_and_gives_up_a_dead_connection() -> None:
    links: list[Deaf] = []

    async def connect() -> Link:
        links.append(Deaf())
        return links[-1]  # type: ignore[return-value]

    backoff = Backoff(0.01, 2.0, 0.02)
    channel = Channel(connect, Quiet(), backoff, lambda: 0.0, time.monotonic, pong_within_s=0.3)
    assert channel.poke() is False
    task = asyncio.create_task(channel.run())
    async with asyncio.timeout(5):
        while channel.connected_for_s is None:
            await asyncio.sleep(0.01)
    assert channel.poke() is True
    assert Ping(1) in links[0].sent
    async with asyncio.timeout(5):
        while len(links) < 2:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)
    assert len(links) == 2  # nobody has poked the new one
    task.cancel()
    await asyncio.wait([task])
