"""Wishes, verdicts and jobs."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.dialects.sqlite import insert

from instar_server.domain.verdicts import Recorded, Verdict
from instar_server.domain.wanted import GROUP, NODE, Wish
from instar_server.storage.connection import Connection
from instar_server.storage.rows import JobRow
from instar_server.storage.schema import counters, jobs, verdicts, wishes


class Wishes:
    def __init__(self, connection: Connection) -> None:
        self._c = connection

    async def next_generation(self, now: float) -> int:
        """A number greater than any that was given out before, also by a database whose place a backup has taken:
        it is `now` (unix time) in milliseconds at least."""
        least = max(1, int(now * 1000))
        counted = insert(counters).values(name="generation", value=least)
        value = func.max(counters.c.value + 1, least)  # SQLite's, of two values
        counted = counted.on_conflict_do_update(index_elements=["name"], set_={"value": value})
        return int((await self._c.execute(counted.returning(counters.c.value))).scalar_one())

    async def put(self, wish: Wish) -> None:
        values = {name: getattr(wish, name) for name in wishes.c.keys()}  # noqa: SIM118  a collection, not a dict
        keys = ["scope", "subject", "line"]
        changed = {name: value for name, value in values.items() if name not in keys}
        await self._c.execute(
            insert(wishes).values(**values).on_conflict_do_update(index_elements=keys, set_=changed)
        )

    async def remove(self, scope: str, subject: str, line: str) -> bool:
        w = wishes.c
        gone = delete(wishes).where(w.scope == scope, w.subject == subject, w.line == line)
        return await self._c.change(gone) > 0

    async def all(self) -> list[Wish]:
        w = wishes.c
        rows = await self._c.execute(select(wishes).order_by(w.scope, w.subject, w.line))
        return [Wish(**row) for row in rows.mappings()]

    async def near(self, node: str, group: str) -> list[Wish]:
        """Those that may count for a node."""
        w = wishes.c
        mine = or_((w.scope == GROUP) & (w.subject == group), (w.scope == NODE) & (w.subject == node))
        return [Wish(**row) for row in (await self._c.execute(select(wishes).where(mine))).mappings()]


class Verdicts:
    def __init__(self, connection: Connection) -> None:
        self._c = connection

    async def put(self, node: str, tx: str, phase: str, recorded: Recorded, now: float) -> None:
        """Store; a later verdict on the same transaction and phase takes the place of the earlier."""
        verdict = recorded.verdict
        changed: dict[str, Any] = {
            "digest": recorded.digest,
            "verdict": verdict.verdict,
            "code": verdict.code,
        }
        changed |= {"text": verdict.text, "at": now}
        stored = insert(verdicts).values(node=node, tx=tx, phase=phase, **changed)
        await self._c.execute(
            stored.on_conflict_do_update(index_elements=["node", "tx", "phase"], set_=changed)
        )

    async def get(self, node: str, tx: str, phase: str) -> Recorded | None:
        v = verdicts.c
        found = select(verdicts).where(v.node == node, v.tx == tx, v.phase == phase)
        row = (await self._c.execute(found)).first()
        return Recorded(row.digest, Verdict(row.verdict, row.code, row.text)) if row is not None else None

    async def forget(self, before: float) -> int:
        return await self._c.change(delete(verdicts).where(verdicts.c.at < before))


class Jobs:
    def __init__(self, connection: Connection) -> None:
        self._c = connection

    async def add(self, job: JobRow) -> None:
        values = {name: getattr(job, name) for name in JobRow.__dataclass_fields__}
        await self._c.execute(insert(jobs).values(**values))

    async def get(self, node: str, id_: str) -> JobRow | None:
        """A job of this node; another node's job is not seen."""
        row = (await self._c.execute(select(jobs).where(jobs.c.id == id_, jobs.c.node == node))).first()
        if row is None:
            return None
        return JobRow(
            row.id, row.node, row.purpose, row.tx, row.digest, row.version, row.nonce, row.made, row.ended
        )

    async def end(self, id_: str, now: float, result: dict[str, Any]) -> bool:
        """Store what came of a job, once. False: it had ended before."""
        first = update(jobs).where(jobs.c.id == id_, jobs.c.ended.is_(None))
        return await self._c.change(first.values(ended=now, result=json.dumps(result))) > 0

    async def forget(self, before: float) -> int:
        return await self._c.change(delete(jobs).where(jobs.c.made < before))
