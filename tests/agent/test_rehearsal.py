"""`agent --rehearse`: its exit status is 0 only when the whole path worked and the server ended it."""

from __future__ import annotations

import asyncio

import pytest

from instar.wire.messages import Ack, Job, Ping, Refused, Result
from tests.agent.fleet import Agent, Connection, Place, Server

JOB = Job("r-1", "selftest", "rehearsal", {"nonce": "cd" * 16})
OVER = Refused("rehearsal-over", "the rehearsal is over")


async def begin(place: Place, server: Server, *args: str) -> tuple[Agent, Connection]:
    agent = await place.start("--rehearse", "--tx", "tx-1", *args)
    return agent, await server.connection()


async def test_the_whole_path(place: Place, server: Server) -> None:
    agent, connection = await begin(place, server)
    assert (connection.hello.role, connection.hello.tx) == ("rehearsal", "tx-1")
    assert connection.headers["Instar-Program"].startswith("rehearsal ")
    await connection.send(Ping(1))
    await connection.send(JOB)
    result = await connection.expect(Result)
    assert result.reply["digest"] == place.program.digest
    await connection.send(Ack("r-1"))
    await connection.send(OVER)
    assert await agent.wait() == 0
    assert agent.said() == ""


async def test_leaves_nothing_behind(place: Place, server: Server) -> None:
    before = sorted(place.layout.state.rglob("*"))
    agent, connection = await begin(place, server)
    await connection.send(JOB)
    await connection.expect(Result)
    await connection.send(Ack("r-1"))
    await connection.send(OVER)
    assert await agent.wait() == 0
    assert [path for path in sorted(place.layout.state.rglob("*")) if path.name != "log-0"] == before


async def test_beside_the_running_agent(place: Place, server: Server) -> None:
    await place.start()
    await server.connection()
    await test_the_whole_path(place, server)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([Refused("revoked", "this node was revoked")], "this node was revoked"),
        ([OVER], "cannot rehearse: expected 'job'"),
        ([Job("r-1", "selftest", "job", {"nonce": "cd" * 16})], "expected a rehearsal job"),
        ([JOB, OVER], "expected 'ack'"),
        ([JOB, Ack("r-2"), OVER], "expected ack r-1"),
        ([JOB, Ack("r-1"), Refused("draining", "bye")], "the server said 'bye'"),
        ([Job("r-1", "nothing", "rehearsal"), Ack("r-1"), OVER], "unknown-module"),
    ],
)
async def test_any_other_end_is_a_failure(
    place: Place, server: Server, answers: list[Job | Ack | Refused], words: str
) -> None:
    agent, connection = await begin(place, server)
    for answer in answers:
        await connection.send(answer)
        if isinstance(answer, Job) and answer.purpose == "rehearsal":
            await connection.expect(Result)
    assert await agent.wait() > 0
    assert words in agent.said()
    assert agent.said().count("\n") == 1


async def test_server_that_goes_away(place: Place, server: Server) -> None:
    agent, connection = await begin(place, server)
    await connection.send(JOB)
    await connection.expect(Result)
    await connection.cut()
    assert await agent.wait() == 5


async def test_acknowledged_but_not_ended(place: Place, server: Server) -> None:
    agent, connection = await begin(place, server, "--within", "8")
    await connection.send(JOB)
    await connection.expect(Result)
    await connection.send(Ack("r-1"))
    assert await agent.wait() == 5
    assert "no end within 8 s" in agent.said()


async def test_server_that_is_not_there(place: Place, server: Server) -> None:
    await server.stop()
    agent = await place.start("--rehearse", "--tx", "tx-1")
    assert await agent.wait() == 5
    assert "cannot reach" in agent.said()


@pytest.mark.parametrize("args", [["--rehearse"], ["--rehearse", "--tx"], ["--what"], ["--within", "soon"]])
async def test_usage(place: Place, args: list[str]) -> None:
    agent = await place.start(*args)
    assert await agent.wait() == 2
    assert agent.said().startswith("usage: ")


async def test_stopped_in_the_middle(place: Place, server: Server) -> None:
    agent, _ = await begin(place, server)
    agent.process.terminate()
    assert await agent.wait() != 0
    await asyncio.sleep(0)
