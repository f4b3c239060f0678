"""What the tests of orders share: a server that is impatient, and short words for its API."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from typing import Any

from tests.server.test_channel import eventually
from tests.server.world import WITHIN_S, Channel, Node, World


async def heard(channel: Channel) -> None:
    """Return when the server has heard all that was sent until now. What comes again until then is passed over."""
    n = 1_000_000 + int(time.monotonic_ns() % 1_000_000_000)
    await channel.send("ping", n=n)
    while (frame := await channel.read()) != {"t": "pong", "n": n}:
        assert frame["t"] == "job", frame
        assert channel.jobs[frame["id"]] > 1, frame


async def settled(world: World, channel: Channel) -> None:
    """Return when it is stored that the node has taken its jobs: none of them is sent again for want of that."""
    words = "SELECT count(*) FROM order_jobs WHERE node = ? AND state = 'sent'"

    def none_waits() -> bool:
        with sqlite3.connect(world.layout.database, timeout=WITHIN_S) as database:
            return database.execute(words, (channel.node.id,)).fetchone() == (0,)

    await eventually(none_waits)
    await asyncio.sleep(0.3)  # for what was decided just before
    await heard(channel)


def hurry(world: World, order_: dict[str, Any]) -> None:
    """As if all the time that an order has were over."""
    with sqlite3.connect(world.layout.database, timeout=WITHIN_S) as database:
        database.execute("UPDATE orders SET lapse_at = made - 100000 WHERE id = ?", (order_["id"],))
        database.execute("UPDATE order_jobs SET due_at = 1 WHERE order_id = ?", (order_["id"],))


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
