"""Who asks for parcels, and the one thread that makes them.

Making one copies, syncs and hashes a whole release. It has a thread of its own, so that nothing else of the
server ever waits for it, and who asks for what is being made gets that one: a whole fleet that is sent a release
costs one making.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from instar.core.errors import MachineError
from instar_server.domain.errors import TooMany
from instar_server.services.parcel_folder import KEEP, Parcel, ParcelFolder, consistent, find
from instar_server.trust.repository import Repository

__all__ = ["Parcel", "Parcels"]

T = TypeVar("T")
log = logging.getLogger(__name__)

MOST_WAITING = 64  # different ones: who asks for the same one shares its place
CLOSE_S = 5.0  # for the one that is being made to notice


class Parcels:
    """For one event loop. `close` at the end."""

    def __init__(self, repository: Repository, folder: Path, keep: int = KEEP) -> None:
        self._repository = repository
        self._folder = ParcelFolder(repository, folder, keep)
        self._thread = ThreadPoolExecutor(1, "parcels")
        self._waiting: dict[Hashable, asyncio.Future[Any]] = {}
        self._archives: dict[str, str] = {}  # sha256 -> sha384; the bytes behind the first never change
        self._closed = False

    async def parcel_of(self, target: str) -> Parcel:
        """The parcel of a target as it is served now; made if it is not there.

        Raises NotFound `no-target`, MachineError `blob-missing`, `altered-blob`, `disk-full`, `disk-failed`, `stopped`,
        TooMany `too-many-parcels`.
        """
        key = ("parcel", target, self._repository.versions())
        return await self._shared(key, lambda: self._folder.parcel_of(target))

    async def doubt(self, parcel: Parcel) -> bool:
        """A node says that it came altered. True: it was altered here, and is made anew next time.

        A node's word alone does not have one made anew: one node could keep this server at it for ever.
        Raises MachineError `stopped`, TooMany.
        """
        key = ("doubt", parcel.path, parcel.sha384)
        altered = await self._shared(key, lambda: self._folder.remove_if_altered(parcel))
        if altered:
            log.warning("the parcel of %s was altered on this disk, and is made anew", parcel.target)
        return altered

    async def archive_sha384(self, target: str) -> str:
        """SHA-384 of a target's own bytes. Raises as `parcel_of`."""
        record = find(self._repository.targets(), target)
        known = self._archives.get(record.sha256)
        if known is None:
            key = ("archive", record.sha256)
            known = await self._shared(key, lambda: self._folder.archive_sha384(record))
            self._archives[record.sha256] = known
        return known

    def url_path(self, target: str) -> str:
        """Where the target is served: `/v1/targets/<consistent name>`. Raises NotFound `no-target`."""
        return f"/v1/targets/{consistent(find(self._repository.targets(), target))}"

    async def close(self) -> None:
        """Make no more. Who still waits gets MachineError `stopped`."""
        self._closed = True
        self._folder.stop()
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._waiting:
            await asyncio.wait(tuple(self._waiting.values()), timeout=CLOSE_S)

    async def _shared(self, key: Hashable, work: Callable[[], T]) -> T:
        """What `work` gives, done by the thread once for all who ask for it meanwhile."""
        job = self._waiting.get(key)
        if job is None:
            job = self._begin(key, work)
        try:
            return await asyncio.shield(job)  # one that gives up takes nobody with it
        except asyncio.CancelledError:
            if job.cancelled():
                raise _stopped() from None
            raise

    def _begin(self, key: Hashable, work: Callable[[], T]) -> asyncio.Future[T]:
        if self._closed:
            raise _stopped()
        if len(self._waiting) >= MOST_WAITING:
            raise TooMany(
                "too-many-parcels", f"cannot make a parcel now: {len(self._waiting)} others wait to be made"
            )
        job = asyncio.get_running_loop().run_in_executor(self._thread, work)
        self._waiting[key] = job

        def ended(_job: asyncio.Future[T]) -> None:
            del self._waiting[key]
            with contextlib.suppress(asyncio.CancelledError):
                _job.exception()  # nobody may be left to hear of it

        job.add_done_callback(ended)
        return job


def _stopped() -> MachineError:
    return MachineError("stopped", "cannot make the parcel: the server is stopping")
