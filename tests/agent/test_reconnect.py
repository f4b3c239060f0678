"""The channel's own clockwork, on a clock that the test turns: silence, refusals, waits, hurry."""

from __future__ import annotations

import asyncio

import pytest

from instar.agent.channel import PONG_WITHIN_S, Channel
from instar.agent.link import Incoming, Link, Refusal
from instar.core.backoff import Backoff
from instar.core.errors import ServerUnreachable
from instar.wire.messages import Health, Hello, Job, Message, Ping, Welcome

HELLO = Hello(1, "agent", "n-0", "1.0.0", "ab", "boot", 1, 0.0)
WELCOME = Welcome(1, "test", ping_s=30.0, health_s=100.0)


class Duties:
    def hello(self) -> Hello:
        return HELLO

    def health(self) -> Health:
        return Health(True)

    def welcomed(self) -> None: ...

    def look(self, reason: str) -> None: ...

    def job(self, job: Job) -> None: ...

    def acknowledged(self, job_id: str) -> None: ...


class ScriptedLink(Link):
    """Gives each scripted batch at once, then is silent: a wait just turns the clock on by as much."""

    def __init__(self, world: World, script: list[list[Incoming]]) -> None:
        self.world, self.script = world, script
        self.sent: list[Message] = []
        self.closed_at: float | None = None

    def send(self, message: Message) -> None:
        self.sent.append(message)

    async def receive(self, within_s: float) -> list[Incoming]:
        await asyncio.sleep(0)
        if self.script:
            return self.script.pop(0)
        self.world.time += within_s
        return []

    async def close(self, code: int = 1000) -> None:
        self.closed_at = self.world.time


class World:
    def __init__(self) -> None:
        self.time = 1000.0
        self.links: list[ScriptedLink] = []
        self.script: list[list[Incoming] | Exception] = []
        self.opened = asyncio.Event()

    def now(self) -> float:
        return self.time

    async def open_link(self) -> Link:
        self.opened.set()
        step = self.script.pop(0) if self.script else ServerUnreachable("server-unreachable", "away")
        if isinstance(step, Exception):
            raise step
        self.links.append(ScriptedLink(self, [step]))
        return self.links[-1]

    def channel(self, floor_s: float = 60.0) -> Channel:
        return Channel(self.open_link, Duties(), Backoff(floor_s, 2.0, floor_s * 10), lambda: 0.0, self.now)

    async def next_try(self) -> None:
        self.opened.clear()
        async with asyncio.timeout(5):
            await self.opened.wait()


async def finish(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def until_closed(world: World) -> ScriptedLink:
    async with asyncio.timeout(5):
        while not world.links or world.links[0].closed_at is None:
            await asyncio.sleep(0)
    return world.links[0]


async def test_a_dead_peer_is_left() -> None:
    world = World()
    world.script = [[WELCOME]]
    task = asyncio.create_task(world.channel().run())
    link = await until_closed(world)
    assert link.closed_at == pytest.approx(1000 + WELCOME.ping_s + PONG_WITHIN_S)
    assert [type(message) for message in link.sent] == [Hello, Health, Ping]
    await finish(task)


async def test_no_welcome_no_wait() -> None:
    world = World()
    world.script = [[]]
    task = asyncio.create_task(world.channel().run())
    link = await until_closed(world)
    assert link.closed_at == pytest.approx(1010)
    await finish(task)


async def test_hurry_cuts_its_own_wait_short() -> None:
    world = World()
    channel = world.channel(floor_s=60.0)
    task = asyncio.create_task(channel.run())
    await world.next_try()
    await asyncio.sleep(0.05)
    channel.hurry()
    await world.next_try()
    await finish(task)


async def test_hurry_does_not_overrule_the_server() -> None:
    world = World()
    world.script = [Refusal("draining", "later", 600.0)]
    channel = world.channel(floor_s=0.01)
    task = asyncio.create_task(channel.run())
    await world.next_try()
    await asyncio.sleep(0.05)
    world.opened.clear()
    channel.hurry()
    await asyncio.sleep(0.3)
    assert not world.opened.is_set()
    await finish(task)


async def test_nothing_is_sent_without_a_connection() -> None:
    channel = World().channel()
    assert channel.send(Ping(1)) is False
    assert channel.connected_for_s is None
