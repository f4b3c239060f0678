"""The module of a job that waits for it: fetched before the job's turn, and tried again while that may help.

Imported when the first module is missing: the resident does not carry it before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from instar.agent.shelf import KILLED, Shelf
from instar.core.backoff import Backoff
from instar.core.errors import InstarError, ServerUnreachable
from instar.wire.messages import Job

AT_ONCE = 2
MOST_S = 600.0  # for a module to come, however often that is tried, from the moment it has a place
RETRY = (1.0, 2.0, 60.0)  # floor, factor, cap, in seconds

log = logging.getLogger("instar.agent")


class Bringer:
    """`random01` draws from [0, 1]."""

    def __init__(self, shelf: Shelf, random01: Callable[[], float]) -> None:
        self._shelf, self._random01 = shelf, random01
        self._places = asyncio.Semaphore(AT_ONCE)

    async def bring(self, job: Job) -> str:
        """Return when the job's module is on the disk: '', or why it will not come."""
        try:
            async with self._places, asyncio.timeout(MOST_S):
                await self._until_there(job)
        except TimeoutError:
            return f"cannot fetch module {job.module} {job.version} within {MOST_S:g} s"
        except InstarError as error:
            return f"{error.text} ({error.code})"
        return ""

    async def _until_there(self, job: Job) -> None:
        """Tried again are a server that cannot be reached, or has passing trouble, and a child that was killed."""
        backoff = Backoff(*RETRY)
        while True:
            try:
                await self._shelf.fetch(job.module, job.version, job.digest, job.target, MOST_S)
                return
            except InstarError as error:
                if error.code != KILLED and not isinstance(error, ServerUnreachable):
                    raise
                wait_s = backoff.next(self._random01())
                log.warning("job %s: %s; next try in %.1f s", job.id, error.text, wait_s)
                await asyncio.sleep(wait_s)
