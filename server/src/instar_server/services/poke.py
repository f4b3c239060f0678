"""Waking a node from here: one TCP connection to its wake-up port, on which nothing is said."""

from __future__ import annotations

import asyncio
import contextlib

from instar.core.errors import MachineError
from instar_server.domain.errors import Conflict

WITHIN_S = 5.0


async def poke(node: str, address: str, port: int) -> None:
    """Connect and close. Raises Conflict `no-wake-port`, MachineError `no-answer`."""
    if not address or not port:
        raise Conflict("no-wake-port", f"cannot poke {node}: it has told of no wake-up port")
    try:
        async with asyncio.timeout(WITHIN_S):
            _, writer = await asyncio.open_connection(address, port)
    except TimeoutError:
        raise MachineError("no-answer", f"cannot poke {node}: {address} port {port} is silent") from None
    except OSError as error:
        text = f"cannot poke {node}: nothing answers at {address} port {port}: {error!s:.200}"
        raise MachineError("no-answer", text[:300]) from None
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(WITHIN_S):
            await writer.wait_closed()
