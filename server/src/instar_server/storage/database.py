"""The database file: SQLite in WAL mode, one writer, a few readers.

`synchronous=FULL`: when a write has been committed it survives a kill and a power cut, so what
the server has acknowledged is never lost. A single writing connection that begins with IMMEDIATE means
that two writers of this process wait for each other instead of failing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine, NullPool, create_engine, event
from sqlalchemy.exc import TimeoutError as PoolTimeout

from instar_server.storage.connection import Connection, Slot, Work

T = TypeVar("T")
TURN_WITHIN_S = 30.0  # for a connection to become free
PRAGMAS = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=FULL",
    "PRAGMA foreign_keys=ON",
    "PRAGMA busy_timeout=10000",  # milliseconds
)


class Database:
    """`read()` and `write()` give a connection inside one transaction. Close it at the end."""

    def __init__(self, path: Path, readers: int = 3) -> None:
        self._engines = _engine(path, "BEGIN"), _engine(path, "BEGIN IMMEDIATE")
        self._readers = _slots(self._engines[0], readers, "reader")
        self._writers = _slots(self._engines[1], 1, "writer")

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Connection]:
        """A snapshot; nothing may be written."""
        async with _transaction(self._readers, False) as connection:
            yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Connection]:
        """Committed, and on the disk, when the block ends; rolled back when it raises."""
        async with _transaction(self._writers, True) as connection:
            yield connection

    async def read_at_once(self, work: Work[T]) -> T:
        """As `read`, with `work` run in the connection's thread: one turn of it in all, where `read` costs
        one for every statement (0.1 ms each). `work` may await the connection's calls and nothing else."""
        return await _at_once(self._readers, work, False)

    async def write_at_once(self, work: Work[T]) -> T:
        """As `write`; see `read_at_once`. Committed, and on the disk, when it returns."""
        return await _at_once(self._writers, work, True)

    async def close(self) -> None:
        """Wait for those in use, as long as a turn may take. Nothing can be asked afterwards."""
        for slots, count in ((self._readers, self._readers.maxsize), (self._writers, 1)):
            for _ in range(count):
                await (await _turn(slots)).close()
        for engine in self._engines:
            engine.dispose()


_Slots = asyncio.LifoQueue[Slot]  # the one used last is used next, so that few threads are ever started


def _slots(engine: Engine, count: int, name: str) -> _Slots:
    slots: _Slots = asyncio.LifoQueue(count)
    for number in range(count):
        slots.put_nowait(Slot(engine, f"{name}-{number}"))
    return slots


async def _turn(slots: _Slots) -> Slot:
    try:
        async with asyncio.timeout(TURN_WITHIN_S):
            return await slots.get()
    except TimeoutError:
        raise PoolTimeout(f"no connection became free within {TURN_WITHIN_S:g} s") from None


async def _at_once(slots: _Slots, work: Work[T], keep: bool) -> T:
    slot = await _turn(slots)
    try:
        return await slot.at_once(work, keep)
    finally:
        slots.put_nowait(slot)


@asynccontextmanager
async def _transaction(slots: _Slots, keep: bool) -> AsyncIterator[Connection]:
    slot = await _turn(slots)
    try:
        try:
            await slot.begin()
            yield Connection(slot)
        except BaseException:
            await slot.end(False)
            raise
        await slot.end(keep)
    finally:
        slots.put_nowait(slot)


def _engine(path: Path, begin: str) -> Engine:
    # Errors are logged: without the values, which may be secret and may be thousands.
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        # The driver must not begin transactions by itself: it would begin too late, and not IMMEDIATE.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in PRAGMAS:
            cursor.execute(pragma)
        cursor.close()

    @event.listens_for(engine, "begin")
    def start(connection: Any) -> None:
        connection.exec_driver_sql(begin)

    return engine
