"""What the tests of orders share: a server that is impatient, and short words for its API."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.server.test_channel import eventually
from tests.server.world import Node, World


async def order(world: World, *nodes: Node, **body: Any) -> dict[str, Any]:
    return await asyncio.to_thread(lambda: world.order(*nodes, **body))


async def show(world: World, order_: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = await asyncio.to_thread(world.ask, "GET", f"/jobs/{order_['id']}")
    return found


async def row(world: World, order_: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = (await show(world, order_))["rows"][0]
    return found


async def until(world: World, order_: dict[str, Any], state: str) -> dict[str, Any]:
    """The only row, once it is in `state`."""
    await eventually(lambda: world.ask("GET", f"/jobs/{order_['id']}")["rows"][0]["state"] == state)
    return await row(world, order_)
