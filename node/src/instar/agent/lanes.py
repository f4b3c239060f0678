"""What waits and runs of the jobs of one store, in the order of arrival."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from instar.agent.store import Store
from instar.wire.messages import Job

if TYPE_CHECKING:
    from instar.agent.shelf import Module


class Entry:
    """A job that has not ended. `lapse_at` is boot time, None: never. `stop` is done to end its run."""

    def __init__(self, job: Job, lapse_at: float | None) -> None:
        self.job, self.lapse_at = job, lapse_at
        self.stop: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.module: Module | None = None
        self.fetch: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None

    def let_go(self) -> None:
        """It waits no longer, for its lapse or its module."""
        if self.timer is not None:
            self.timer.cancel()
        if self.fetch is not None and self.fetch is not asyncio.current_task():
            self.fetch.cancel()


class Lane:
    """One store, and what waits and runs of it, in the order of arrival."""

    def __init__(self, store: Store, places: int) -> None:
        self.store, self.places = store, places
        self.waiting: dict[str, Entry] = {}
        self.running: dict[str, Entry] = {}
