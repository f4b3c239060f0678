"""Transactions: all or nothing, in order, even when who asked has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import bindparam, insert, select, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from instar_server.storage.connection import Connection, Prepared
from instar_server.storage.database import Database
from instar_server.storage.migrate import upgrade
from instar_server.storage.schema import groups


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    upgrade(tmp_path / "server.db")
    database = Database(tmp_path / "server.db", readers=2)
    yield database
    await database.close()


async def add(connection: Connection, name: str) -> None:
    await connection.execute(insert(groups).values(name=name, created=1.0))


async def names(database: Database) -> list[str]:
    async with database.read() as connection:
        return [row.name for row in await connection.execute(select(groups).order_by(groups.c.name))]


async def add_all(database: Database, *wanted: str) -> None:
    async with database.write() as connection:
        for name in wanted:
            await add(connection, name)


async def test_what_raises_is_rolled_back_and_the_next_one_works(database: Database) -> None:
    before = await names(database)
    with pytest.raises(IntegrityError):
        await add_all(database, "one", "one")
    with pytest.raises(SQLAlchemyError):
        await add_all(database, "two", 3j)  # type: ignore[arg-type]
    await add_all(database, "zzz")
    assert await names(database) == [*before, "zzz"]


async def test_a_cancelled_transaction_leaves_nothing_behind(database: Database) -> None:
    """Cancelled at every moment that it has: waiting for its turn, in the middle, at the end."""
    before = await names(database)
    finished = 0

    async def write(number: int) -> None:
        nonlocal finished
        async with database.write() as connection:
            for part in "ab":
                await add(connection, f"z{number}-{part}")
            await asyncio.sleep(0)
        finished += 1

    for number in range(40):
        task = asyncio.create_task(write(number))
        for _ in range(number):
            await asyncio.sleep(0.0002)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    found = [name for name in await names(database) if name not in before]
    whole = {name.partition("-")[0] for name in found}
    assert len(found) == 2 * len(whole) >= 2 * finished  # both halves or none
    async with database.write() as connection:
        await add(connection, "after")
    assert "after" in await names(database)


async def test_writers_wait_for_each_other_and_readers_see_whole_transactions(database: Database) -> None:
    async def write(number: int) -> None:
        async with database.write() as connection:
            await add(connection, f"y{number}a")
            await asyncio.sleep(0.002)
            await add(connection, f"y{number}b")

    async def read() -> None:
        for _ in range(20):
            assert len([name for name in await names(database) if name.startswith("y")]) % 2 == 0

    await asyncio.gather(*(write(number) for number in range(10)), read(), read(), read())
    assert len([name for name in await names(database) if name.startswith("y")]) == 20


async def test_a_reader_reads_one_snapshot(database: Database) -> None:
    async with database.read() as connection:
        before = (await connection.execute(select(groups))).all()
        async with database.write() as writing:
            await add(writing, "later")
        assert (await connection.execute(select(groups))).all() == before
    assert "later" in await names(database)


async def test_a_database_that_fails_says_so_each_time_and_recovers(tmp_path: Path) -> None:
    folder = tmp_path / "not-there"
    database = Database(folder / "server.db")
    for _ in range(2):
        with pytest.raises(SQLAlchemyError):
            await add_all(database, "x")
    folder.mkdir()
    upgrade(folder / "server.db")
    async with database.write() as connection:
        await add(connection, "x")
        assert await connection.change(text("UPDATE groups SET created = 2 WHERE name = 'x'")) == 1
    assert "x" in await names(database)
    await database.close()


async def test_a_transaction_in_one_turn_is_whole_too(database: Database) -> None:
    before = await names(database)

    async def two(connection: Connection) -> str:
        await add(connection, "at-once-1")
        await add(connection, "at-once-2")
        return "done"

    async def twice(connection: Connection) -> None:
        await add(connection, "at-once-3")
        await add(connection, "at-once-3")

    async def waits(connection: Connection) -> None:
        await add(connection, "at-once-4")
        await asyncio.sleep(0)

    assert await database.write_at_once(two) == "done"
    with pytest.raises(IntegrityError):
        await database.write_at_once(twice)
    with pytest.raises(RuntimeError, match="cannot wait"):
        await database.write_at_once(waits)

    async def read(connection: Connection) -> int:
        return len((await connection.execute(select(groups))).all())

    assert await database.read_at_once(read) == len(before) + 2
    assert await names(database) == sorted([*before, "at-once-1", "at-once-2"])


async def test_a_prepared_statement_is_used_again_and_again(database: Database) -> None:
    adding = Prepared(insert(groups).values(name=bindparam("b_name"), created=7.0))
    finding = Prepared(select(groups).where(groups.c.name == bindparam("b_name")))

    async def add_some(connection: Connection) -> None:
        await connection.run(adding, {"b_name": "p1"})
        await connection.run(adding, [{"b_name": "p2"}, {"b_name": "p3"}])

    await database.write_at_once(add_some)
    async with database.read() as connection:  # the other way to the same thing
        for name in ("p1", "p2", "p3"):
            assert await connection.run(finding, {"b_name": name}) == [{"name": name, "created": 7.0}]
        assert await connection.run(finding, {"b_name": "p4"}) == []
    with pytest.raises(IntegrityError) as caught:
        async with database.write() as connection:
            await connection.run(adding, {"b_name": "p1"})
    assert "p1" not in str(caught.value)  # values stay out of the log
