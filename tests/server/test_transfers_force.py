"""Native updates of nodes that take a release through their channel although they have it, once for each wish."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server import taking
from tests.server.test_channel import alive
from tests.server.test_transfers import NOISE, as_updater, digest, own_world, want
from tests.server.world import Channel, Node, World, running

FORCED: dict[str, Any] = {"features": ["native", "native-force"]}


@pytest.fixture(scope="module")
def sending(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("forced"), ping_s=30.0, native_block=4096) as world:
        world.publish("1.1.0", NOISE)
        yield world


@pytest.fixture
async def node(sending: World) -> Node:
    return await asyncio.to_thread(sending.new_node, f"g{os.urandom(4).hex()}")


async def test_a_forced_node_is_sent_what_it_has(sending: World, node: Node) -> None:
    async with node.connected("1.1.0", **FORCED) as channel:
        await want(node)
        offered = await taking.offer(channel)
        assert (offered["line"], offered["digest"]) == ("agent", digest(sending))
        generation = offered["generation"]
        await taking.take(channel, offered, digest="f" * 96)
        assert (await channel.read_type("look"))["reason"] == "agent 1.1.0 is here"
        view = await taking.state(sending, node.id, "received")
        assert (view["cause"], view["version"]) == ("force", "1.1.0")
        await nothing_comes(channel)  # it has it: the next offer, soon enough, is a question only
        await want(node)
        offered = await taking.offer(channel)
        assert offered["generation"] > generation
        await taking.take(channel, offered, digest="f" * 96)


async def nothing_comes(channel: Channel, seconds: float = 7.0) -> None:
    """Longer than the scheduler's round."""
    with contextlib.suppress(TimeoutError):
        raise AssertionError(await channel.read(seconds))


async def test_what_was_forced_for_a_wish_is_asked_once_for_a_connection(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """By what the node answers: also a server that was restarted sends no byte."""
    async with own_world(tmp_path_factory, native_block=4096) as world:
        await asyncio.to_thread(world.publish, "1.1.0", NOISE)
        node = await asyncio.to_thread(world.new_node)
        await want(node, "1.1.0", "agent", "updater")
        await asyncio.to_thread(as_updater, node, digest(world))
        for _ in range(2):
            async with node.connected("1.1.0", **FORCED) as channel:
                lines = []
                for _ in range(2):  # each line that it has, one after the other
                    offered = await taking.offer(channel)
                    lines.append(offered["line"])
                    await taking.have(channel, offered, digest=digest(world))
                assert lines == ["updater", "agent"]
                await taking.state(world, node.id, "not-needed")
                await nothing_comes(channel)
            await asyncio.to_thread(world.kill)
            await asyncio.to_thread(world.start)
            await asyncio.to_thread(as_updater, node, digest(world))


@pytest.mark.parametrize("features", [["native"], []])
async def test_another_node_is_not_sent_what_it_has(sending: World, node: Node, features: list[str]) -> None:
    async with node.connected("1.1.0", features=features) as channel:
        await want(node)
        await nothing_comes(channel)
        assert await alive(channel)


async def test_a_forced_node_that_fetches_is_left_alone(sending: World, node: Node) -> None:
    async with node.connected("1.1.0", **FORCED) as channel:
        await want(node, via="pull")
        await nothing_comes(channel)
