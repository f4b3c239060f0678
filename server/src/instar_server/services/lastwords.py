"""The nodes' last words about orders, stored before anybody is told: many that come together in one transaction.

Nothing waits for more to come: while one transaction is written the next ones gather.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from instar.core.errors import MachineError
from instar_server.domain.orders import COMMAND, OPEN
from instar_server.services.history import History, restart_ended
from instar_server.services.ports import Now
from instar_server.storage.connection import Connection
from instar_server.storage.database import Database
from instar_server.storage.events import Events
from instar_server.storage.orders import Orders, row_after
from instar_server.storage.rows import Word

AT_ONCE = 256  # words in one transaction
MOST_BYTES = 16 * 1024 * 1024  # of results in one transaction

_Waiting = tuple[Word, "asyncio.Future[Stored | None]"]


@dataclass(frozen=True, slots=True)
class Stored:
    """A word that is on the disk. `new`: it is this row's first, and `row` is what is stored of it now;
    `ended`: the row had been open until then."""

    order: str
    new: bool
    ended: bool
    row: dict[str, Any]


class LastWords:
    def __init__(self, database: Database, now: Now) -> None:
        self._database, self._now = database, now
        self._waiting: deque[_Waiting] = deque()
        self._wake = asyncio.Event()

    async def store(self, word: Word) -> Stored | None:
        """Once it is durable. None: this node was never given such a row. Raises SQLAlchemyError."""
        future: asyncio.Future[Stored | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((word, future))
        self._wake.set()
        return await future

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._waiting:
                    await self._store(self._some())
        finally:
            _settle(self._waiting, MachineError("not-stored", "cannot store results: the server is stopping"))

    def _some(self) -> list[_Waiting]:
        """The next ones; never two of one row, since only the first of them counts."""
        some: list[_Waiting] = []
        ids: set[str] = set()
        room = MOST_BYTES
        while self._waiting and len(some) < AT_ONCE and room > 0 and self._waiting[0][0].id not in ids:
            some.append(self._waiting.popleft())
            ids.add(some[-1][0].id)
            room -= len(some[-1][0].result)
        return some

    async def _store(self, some: list[_Waiting]) -> None:
        words = [word for word, _ in some]
        now = self._now()

        async def write(connection: Connection) -> dict[str, dict[str, Any]]:
            before = await Orders(connection).words(words, now)
            for word in words:
                row = before.get(word.id)
                if row is not None and row["kind"] == COMMAND and row["ok"] is None:
                    await Events(connection).append(word.node, History.SERVER, [_entry(word, row, now)], now)
            return before

        try:
            before = await self._database.write_at_once(write)
        except SQLAlchemyError as error:
            _settle(some, error)
        except BaseException:
            _settle(some, MachineError("not-stored", "cannot store results: the server is stopping"))
            raise
        else:
            for word, future in some:
                if not future.done():  # who waited may have gone
                    future.set_result(_stored(word, before.get(word.id), now))


def _settle(some: Iterable[_Waiting], error: Exception) -> None:
    for _, future in some:
        if not future.done():
            future.set_exception(error)
            future.exception()  # seen, also when nobody waits any more


def _stored(word: Word, row: dict[str, Any] | None, now: float) -> Stored | None:
    if row is None:
        return None
    new = row["ok"] is None
    after = row_after(word, row, now) if new else {}
    return Stored(row["order_id"], new, new and row["state"] in OPEN, after)


def _entry(word: Word, row: dict[str, Any], now: float) -> dict[str, Any]:
    """A restart's end in the node's history."""
    by = f"{row['made_by']} in order {row['order_id']}"
    return restart_ended(word.id, row["name"], by, word.ok, word.code, word.text, now)
