"""Tell the updater to look. It may be absent: then it looks by itself, when its own time comes."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

WITHIN_S = 2.0
REQUEST = json.dumps({"v": 1, "do": "look"}).encode() + b"\n"

log = logging.getLogger("instar.agent")


class Waker:
    """Wakes one at a time: a wake asked for during another one is one more, however often it was asked."""

    def __init__(self, updater_socket: Path) -> None:
        self._path = updater_socket
        self._asked = asyncio.Event()
        self._missed = False

    def wake(self) -> None:
        self._asked.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            try:
                async with asyncio.timeout(WITHIN_S):
                    answer = await self._ask()
            except (OSError, ValueError) as error:  # TimeoutError is an OSError
                self._note(f"{type(error).__name__} {error}".strip())
                continue
            self._missed = False
            log.info("woke the updater: %s", "ok" if answer.get("ok") else ascii(answer)[:200])

    async def _ask(self) -> dict[str, object]:
        reader, writer = await asyncio.open_unix_connection(self._path, limit=65_536)
        try:
            writer.write(REQUEST)
            answer = json.loads(await reader.readline())
        finally:
            writer.transport.abort()
        if not isinstance(answer, dict):
            raise ValueError("its answer is not an object")
        return answer

    def _note(self, words: str) -> None:
        """Once per absence."""
        if not self._missed:
            log.warning("cannot wake the updater: %s; it looks by itself", words)
        self._missed = True
