"""Many simulated agents, and the questions one asks of them: are all there, how long did it take."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable

from instar.core.errors import MachineError
from instar_lab.sim.agent import SimAgent
from instar_lab.sim.identities import Identity

FIRST_AT_ONCE = 40  # first connections under way at a time


class Swarm:
    """An async context manager: agents run inside it and are gone after it."""

    def __init__(self, identities: list[Identity], host: str, port: int, seed: int = 1) -> None:
        self._moved = asyncio.Event()
        self.connected = 0
        self.agents = [
            SimAgent(identity, host, port, random.Random(seed + number), self._changed)
            for number, identity in enumerate(identities)
        ]
        self._tasks: list[asyncio.Task[None]] = []

    def _changed(self, by: int) -> None:
        self.connected += by
        self._moved.set()

    async def __aenter__(self) -> Swarm:
        first = asyncio.Semaphore(FIRST_AT_ONCE)
        self._tasks = [asyncio.create_task(agent.run(first)) for agent in self.agents]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks, return_exceptions=True)
        for agent in self.agents:
            if agent.connection is not None and agent.connection.transport is not None:
                agent.connection.transport.abort()

    async def wait_connected(self, count: int, within_s: float) -> float:
        """Seconds until at least `count` are connected at once. Raises MachineError after `within_s`."""
        return await self._wait(lambda: self.connected >= count, f"{count} connected", within_s)

    async def wait_at_most(self, count: int, within_s: float) -> float:
        """Seconds until at most `count` are connected."""
        return await self._wait(lambda: self.connected <= count, f"at most {count} connected", within_s)

    async def _wait(self, reached: Callable[[], bool], what: str, within_s: float) -> float:
        began = time.monotonic()
        try:
            async with asyncio.timeout(within_s):
                while not reached():
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            got = f"{self.connected}; {self.troubles()}"
            text = f"cannot go on: expected {what} within {within_s:g} s, got {got}"
            raise MachineError("swarm-late", text) from None
        return time.monotonic() - began

    def troubles(self) -> str:
        """The most frequent things that went wrong, in one line."""
        seen = Counter(agent.trouble.replace("\r\n", " ") for agent in self.agents if agent.trouble)
        return "; ".join(f"{count}× {text}" for text, count in seen.most_common(3)) or "no trouble was seen"

    async def ping_all(self, rounds: int, within_s: float, at_once: int = 200) -> tuple[int, float]:
        """Every connected agent of the first `at_once` sends `rounds` pings, each after the last one's pong.

        Returns how many round trips there were and how many seconds they took.
        """
        chosen = [agent for agent in self.agents if agent.connection is not None][:at_once]
        wanted = rounds * len(chosen)
        done = asyncio.Event()
        left = wanted

        def one_of(agent: SimAgent) -> None:
            base = agent.pongs

            def counted() -> None:
                nonlocal left
                left -= 1
                if agent.pongs - base < rounds:
                    agent.ping(agent.pongs)
                if left == 0:
                    done.set()

            agent.counted = counted

        began = time.monotonic()
        for agent in chosen:
            one_of(agent)
            agent.ping(0)
        try:
            async with asyncio.timeout(within_s):
                await done.wait()
        except TimeoutError:
            text = f"cannot go on: expected {wanted} pongs within {within_s:g} s, {left} are missing"
            raise MachineError("swarm-late", text) from None
        finally:
            for agent in chosen:
                agent.counted = lambda: None
        return wanted, time.monotonic() - began
