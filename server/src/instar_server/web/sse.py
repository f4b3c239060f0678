"""Server-sent events out of the bus: a reader that does not read is cut off, never waited for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from instar_server.bus.api import Bus, Message

MOST_WAITING = 1000  # messages kept for a reader that does not read
STILL_HERE_S = 15.0
STREAM = {
    "description": "Server-sent events",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


class Reader:
    """Listens to a topic from the moment that it is made; `close` it."""

    def __init__(self, bus: Bus, topic: str) -> None:
        self._queue: asyncio.Queue[Message] = asyncio.Queue(MOST_WAITING)
        self._full = False
        self._subscription = bus.subscribe(topic, self._take)

    def _take(self, message: Message) -> None:
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self._full = True

    async def bodies(self, for_s: float) -> AsyncIterator[dict[str, Any] | None]:
        """What was published; None now and then, when nothing was. Ends after `for_s` seconds."""
        loop = asyncio.get_running_loop()
        until = loop.time() + for_s
        while (left := until - loop.time()) > 0 and not self._full:
            try:
                async with asyncio.timeout(min(STILL_HERE_S, left)):
                    message = await self._queue.get()
            except TimeoutError:
                yield None
                continue
            yield message.body

    def close(self) -> None:
        self._subscription.close()


def event(body: dict[str, Any] | None) -> str:
    if body is None:
        return ": still here\n\n"
    return f"event: {body['kind']}\ndata: {json.dumps(body)}\n\n"
