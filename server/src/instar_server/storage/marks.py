"""What nodes tell of orders on the way to a result: taken, begun. Kept in memory, written a few times a second.

Nothing in here is needed: when it is lost with the process, the rows are sent again and the nodes say it
again. What a result has overtaken is never written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from instar_server.domain.orders import Event
from instar_server.storage.connection import Connection
from instar_server.storage.database import Database
from instar_server.storage.orders import Orders

log = logging.getLogger(__name__)

ORDER = (Event.TAKEN, Event.BEGUN)
_Rows = dict[str, dict[str, Any]]  # row id -> its columns


class Marks:
    def __init__(self, database: Database, every_s: float = 0.25) -> None:
        self._database, self._every_s = database, every_s
        self._pending: dict[Event, _Rows] = {event: {} for event in ORDER}
        self._wake = asyncio.Event()

    def put(self, event: Event, id_: str, node: str, **columns: Any) -> None:
        """Note that `event`, one of ORDER, has come. The same event has the same columns each time."""
        self._pending[event].setdefault(id_, {"id": id_, "node": node, **columns})
        self._wake.set()

    def drop(self, id_: str) -> None:
        """This row has ended."""
        for rows in self._pending.values():
            rows.pop(id_, None)

    async def flush(self) -> None:
        """Write what is pending. Raises SQLAlchemyError, and then it is gone: it will be told again."""
        pending, self._pending = self._pending, {event: {} for event in ORDER}
        if not any(pending.values()):
            return

        async def write(connection: Connection) -> None:
            for event in ORDER:
                if pending[event]:
                    await Orders(connection).mark(event, list(pending[event].values()))

        await self._database.write_at_once(write)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(self._every_s)  # most results come before this has passed
            self._wake.clear()
            try:
                await self.flush()
            except SQLAlchemyError as error:
                log.error("cannot write which orders were taken: %s", error)

    async def close(self) -> None:
        with contextlib.suppress(SQLAlchemyError):
            await self.flush()
