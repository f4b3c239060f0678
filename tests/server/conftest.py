"""One server for most tests of a worker; tests that kill or alter a server start their own.

Nodes that are played here do not ping by themselves: `ping_s` is so large that none is taken for gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.server import systems
from tests.server.world import Channel, Node, World, running


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(
        tmp_path_factory.mktemp("server"), ping_s=30.0, job_s=3.0, look_floor_s=30.0, wrong_tokens=1000
    ) as world:
        world.publish("1.0.0")
        world.publish("1.1.0")
        for version in ("1.0.0", "1.2.0", "1.10.0"):
            world.publish_module("echo", version)
        world.publish_module("inventory", "1.0.0", "service")
        world.publish_module("inventory", "1.1.0", "service")
        yield world


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server that is impatient: sends again after 0.4 s, asks after 0.6 s of silence."""
    folder = tmp_path_factory.mktemp("orders")
    with running(folder, ping_s=30.0, job_resend_s=0.4, job_silence_s=0.6, wrong_tokens=1000) as world:
        world.publish("1.0.0")
        for version in ("1.0.0", "1.2.0", "1.10.0"):
            world.publish_module("echo", version)
        world.publish_module("inventory", "1.0.0", "service")
        yield world


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server with system bundles, for nodes with two slots."""
    with running(tmp_path_factory.mktemp("systems"), ping_s=30.0, wrong_tokens=1000) as world:
        world.publish("1.0.0")
        systems.publish(world, "1.1.0")
        systems.publish(world, "1.2.0", min_version="1.1.0")
        systems.publish(world, "1.1.0", name="other", compatible=("board-9",))
        yield world


@pytest.fixture
async def node(quick: World) -> Node:
    return await asyncio.to_thread(quick.new_node)


@pytest.fixture
async def channel(node: Node) -> AsyncIterator[Channel]:
    async with node.connected() as found:
        yield found
