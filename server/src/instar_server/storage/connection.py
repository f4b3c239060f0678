"""A database connection that lives in a thread of its own, and is used from the event loop.

SQLAlchemy's own asyncio layer is left out on purpose: it brings the whole ORM (8 MiB, 0.2 s of the start)
for what is a queue in front of a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy import Dialect, Engine
from sqlalchemy.engine import Connection as BlockingConnection
from sqlalchemy.engine import CursorResult, Result
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.sql import ClauseElement, Executable
from sqlalchemy.sql.compiler import SQLCompiler

T = TypeVar("T")
Rows = Result[*tuple[Any, ...]]
Values = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None


Given = Mapping[str, Any] | Sequence[Mapping[str, Any]]
Work = Callable[["Connection"], Coroutine[Any, Any, T]]


class Prepared:
    """A statement that is compiled once. Executed it costs a tenth of one that is built each time (0.2 ms),
    which counts where a person waits for a machine: `Connection.run`, and `Connection.rows` for its rows."""

    def __init__(self, statement: ClauseElement) -> None:
        self._statement = statement
        self._sql: str | None = None
        self._names: tuple[str, ...] = ()
        self._constants: dict[str, Any] = {}

    def compiled(self, dialect: Dialect) -> str:
        if self._sql is None:
            compiled = self._statement.compile(dialect=dialect)
            assert isinstance(compiled, SQLCompiler), "only statements have places for values"
            self._names = tuple(compiled.positiontup or ())
            self._constants = dict(compiled.construct_params(_check=False))
            self._sql = str(compiled)
        return self._sql

    def values(self, given: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(given[name] if name in given else self._constants[name] for name in self._names)


class Slot:
    """One thread and its connection, which is opened at the first use and kept.

    What is asked for is done in that order, even if who asked was cancelled meanwhile: so the end of
    a transaction never overtakes a statement in it. Not for two transactions at a time.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._connection: BlockingConnection | None = None

    async def begin(self) -> None:
        await self._do(self._begin)

    async def execute(self, statement: Executable, values: Values) -> Rows:
        return await self._do(lambda: self._execute(statement, values))

    async def run(self, statement: Prepared, values: Given) -> list[dict[str, Any]]:
        return await self._do(lambda: self._run(statement, values))

    async def change(self, statement: Executable, values: Values) -> int:
        return await self._do(lambda: self._in_use().execute(statement, values).rowcount)

    async def end(self, keep: bool) -> None:
        """Commit, or roll back. A commit that fails is rolled back, and raises."""
        await self._do(lambda: self._end(keep))

    async def at_once(self, work: Work[T], keep: bool) -> T:
        """A whole transaction in one turn of the thread: see `Database.write_at_once`."""
        return await self._do(lambda: self._at_once(work, keep))

    async def close(self) -> None:
        await self._do(self._drop)
        self._thread.shutdown(wait=False)

    async def _do(self, work: Callable[[], T]) -> T:
        # Shielded, since a cancelled future would be taken out of the thread's queue.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, work))

    # ---- in the thread

    def _begin(self) -> None:
        if self._connection is None:
            self._connection = self._engine.connect()
        try:
            self._connection.begin()
        except BaseException:
            self._drop()
            raise

    def _in_use(self) -> BlockingConnection:
        assert self._connection is not None, "no transaction has begun"
        return self._connection

    def _execute(self, statement: Executable, values: Values) -> Rows:
        result: CursorResult[*tuple[Any, ...]] = self._in_use().execute(statement, values)
        # All rows are read here, in the thread: the loop must not wait for the disk.
        return result.freeze()() if result.returns_rows else result

    def _run(self, statement: Prepared, values: Given) -> list[dict[str, Any]]:
        connection = self._in_use()
        sql = statement.compiled(connection.dialect)
        if isinstance(values, Mapping):
            cursor = connection.exec_driver_sql(sql, statement.values(values))
        else:
            cursor = connection.exec_driver_sql(sql, [statement.values(each) for each in values])
        if not cursor.returns_rows:
            return []
        names = tuple(cursor.keys())
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def _at_once(self, work: Work[T], keep: bool) -> T:
        self._begin()
        try:
            done = _without_waiting(work(_Inside(self)))
        except BaseException:
            self._end(False)
            raise
        self._end(keep)
        return done

    def _end(self, keep: bool) -> None:
        if self._connection is None:  # it could not begin
            return
        try:
            if keep:
                self._connection.commit()
            else:
                self._connection.rollback()
        except BaseException:
            self._drop()  # rolls back
            raise

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(SQLAlchemyError):
                connection.close()


class Connection:
    """One transaction, from `Database.read()` or `Database.write()`; of no use after it."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    async def execute(self, statement: Executable, values: Values = None) -> Rows:
        """The rows, all of them read already. Raises SQLAlchemyError."""
        return await self._slot.execute(statement, values)

    async def run(self, statement: Prepared, values: Given) -> list[dict[str, Any]]:
        """Execute a prepared statement, once or for each of `values`. Its rows. Raises SQLAlchemyError."""
        return await self._slot.run(statement, values)

    async def change(self, statement: Executable, values: Values = None) -> int:
        """How many rows an insert, update or delete has touched. Raises SQLAlchemyError."""
        return await self._slot.change(statement, values)


class _Inside(Connection):
    """For work that runs in the connection's own thread: it never waits."""

    async def execute(self, statement: Executable, values: Values = None) -> Rows:
        return self._slot._execute(statement, values)

    async def run(self, statement: Prepared, values: Given) -> list[dict[str, Any]]:
        return self._slot._run(statement, values)

    async def change(self, statement: Executable, values: Values = None) -> int:
        return self._slot._in_use().execute(statement, values).rowcount


def _without_waiting(work: Coroutine[Any, Any, T]) -> T:
    """Run what awaits nothing but such a connection to its end."""
    try:
        work.send(None)
    except StopIteration as end:
        done: T = end.value
        return done
    work.close()
    raise RuntimeError("cannot wait for anything but the connection inside a transaction at once")
