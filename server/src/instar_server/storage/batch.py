"""What changes often and may be lost with the process: last seen, health, what runs.

Kept in memory, last one wins, and written in one transaction a few times a second. Nothing in here
was ever acknowledged to anyone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from sqlalchemy import bindparam, update
from sqlalchemy.exc import SQLAlchemyError

from instar_server.storage.database import Database
from instar_server.storage.schema import nodes

log = logging.getLogger(__name__)

SEEN = ("last_seen",)
AGENT = (
    "agent_version", "agent_digest", "agent_built", "boot_id", "os", "arch", "python", "address", "wake_port",
    "last_seen",
)  # fmt: skip
UPDATER = ("updater_version", "updater_digest", "last_seen")
HEALTH = ("health_ok", "health", "health_at", "last_seen")
SYSTEM = ("system", "system_at", "last_seen")


_Rows = dict[tuple[str, ...], dict[str, tuple[Any, ...]]]  # columns -> node -> values


class Observations:
    """Collects per node; `run` writes every `every_s` seconds, `flush` now."""

    def __init__(self, database: Database, every_s: float = 0.25) -> None:
        self._database, self._every_s = database, every_s
        self._pending: _Rows = {}
        self._writing: _Rows = {}
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()

    def put(self, columns: tuple[str, ...], node: str, *values: Any) -> None:
        """Note the values of `columns` (one of the tuples above) for a node."""
        self._pending.setdefault(columns, {})[node] = values
        self._wake.set()

    def latest(self, node: str) -> dict[str, Any]:
        """What is noted about a node and not written yet."""
        found: dict[str, Any] = {}
        for rows in (self._writing, self._pending):
            for columns, values in rows.items():
                if node in values:
                    found.update(zip(columns, values[node], strict=True))
        return found

    async def flush(self) -> None:
        """Write what is pending. When that fails it stays pending, behind anything newer."""
        async with self._lock:
            pending, self._pending = self._pending, {}
            if not pending:
                return
            self._writing = pending
            try:
                await self._write(pending)
            except BaseException:
                for columns, rows in pending.items():
                    self._pending[columns] = rows | self._pending.get(columns, {})
                raise
            finally:
                self._writing = {}

    async def _write(self, pending: _Rows) -> None:
        async with self._database.write() as connection:
            for columns, rows in pending.items():
                statement = update(nodes).where(nodes.c.id == bindparam("b_id"))
                statement = statement.values({name: bindparam(f"b_{name}") for name in columns})
                names = ["b_id", *(f"b_{name}" for name in columns)]
                values = [dict(zip(names, (node, *row), strict=True)) for node, row in rows.items()]
                await connection.execute(statement, values)

    async def run(self) -> None:
        """Until cancelled. A failing database is tried again, and logged."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self.flush()
            except SQLAlchemyError as error:
                log.error("cannot write what was last seen: %s", error)
                self._wake.set()
                await asyncio.sleep(5.0)
            await asyncio.sleep(self._every_s)

    async def close(self) -> None:
        with contextlib.suppress(SQLAlchemyError):
            await self.flush()
