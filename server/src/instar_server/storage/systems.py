"""Updates of the nodes' operating systems."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import BindParameter, bindparam, case, delete, insert, or_, select, update
from sqlalchemy.sql import ColumnElement

from instar_server.domain import systems
from instar_server.domain.systems import FINAL, OPEN, TAKEN_BACK, ColdBoot, Told, Update
from instar_server.storage.connection import Connection, Prepared
from instar_server.storage.schema import nodes, system_updates

KEEP = 100  # ended ones of a node

_NAMES = tuple(each.name for each in fields(Update))
_S = system_updates.c
# Asked for by every node, every few minutes.
_OPEN = Prepared(
    select(*(_S[name] for name in _NAMES)).where(_S.node == bindparam("b_node"), _S.state == OPEN)
)
_COLD_BOOT = Prepared(
    select(nodes.c.cold_boot_at, nodes.c.cold_boot_generation).where(nodes.c.id == bindparam("b_node"))
)


class SystemUpdates:
    def __init__(self, connection: Connection) -> None:
        self._c = connection

    async def add(self, made: Update) -> None:
        """Raises IntegrityError when the node has an open one."""
        await self._c.execute(insert(system_updates).values(**_columns(made)))
        old = select(_S.id).where(_S.node == made.node, _S.state != OPEN)
        old = old.order_by(_S.generation.desc()).offset(KEEP)
        await self._c.execute(delete(system_updates).where(_S.id.in_(old)))

    async def open_of(self, node: str) -> Update | None:
        rows = await self._c.run(_OPEN, {"b_node": node})
        return _update(rows[0]) if rows else None

    async def cold_boot(self, node: str) -> ColdBoot | None:
        """The one that is wanted."""
        rows = await self._c.run(_COLD_BOOT, {"b_node": node})
        if not rows or rows[0]["cold_boot_at"] is None:
            return None
        return ColdBoot(rows[0]["cold_boot_at"], rows[0]["cold_boot_generation"])

    async def over(self, now: float, node: str = "") -> list[Update]:
        """The open orders, of `node` or of all, that have ended without anybody's word, as they are to be put."""
        idle = (_S.made <= now - systems.LAPSE_S) & (_S.tx == "")
        found = select(*(_S[name] for name in _NAMES), nodes.c.revoked_at, nodes.c.system)
        found = found.join(nodes, nodes.c.id == _S.node).where(_S.state == OPEN)
        found = found.where(or_(nodes.c.revoked_at.is_not(None), idle))
        if node:
            found = found.where(_S.node == node)
        rows = (await self._c.execute(found)).mappings()
        reports = [(row, json.loads(row["system"] or "{}")) for row in rows]
        as_now = [systems.as_of(_update(row), said, row["revoked_at"], now) for row, said in reports]
        return [each for each in as_now if each.state != OPEN]

    async def latest(self, node: str, limit: int) -> list[Update]:
        """Newest first."""
        wanted = select(system_updates).where(_S.node == node).order_by(_S.generation.desc()).limit(limit)
        return [_update(row) for row in (await self._c.execute(wanted)).mappings()]

    async def put(self, changed: Update) -> None:
        values = _columns(changed)
        await self._c.execute(update(system_updates).where(_S.id == changed.id).values(**values))

    async def heard(self, node: str, told: Iterable[Told], now: float) -> None:
        """Events of line `os`, transactions in the order in which the node sent them: those of an update's generation
        change it, a final one of a cold boot's ends that."""
        rows: dict[int, Update] = {}
        told = list(told)
        sent = {tx: place for place, tx in enumerate(dict.fromkeys(each.tx for each in told))}
        for each in sorted(told, key=lambda each: (each.generation, sent[each.tx], each.number)):
            if each.generation not in rows:
                found = await self._of(node, each.generation)
                if found is None:
                    await self._cold_boot_heard(node, each)
                    continue
                rows[each.generation] = found
            before = rows[each.generation]
            rows[each.generation] = systems.after(before, each, now)
        for changed in rows.values():
            await self.put(changed)
        newest, open_ = max((each.generation for each in told), default=0), await self.open_of(node)
        if open_ is not None and open_.generation < newest:
            await self.put(systems.outrun(open_, newest, now))

    async def _of(self, node: str, generation: int) -> Update | None:
        mine = select(system_updates).where(_S.node == node, _S.generation == generation)
        row = (await self._c.execute(mine.where(_S.state.in_((OPEN, *TAKEN_BACK))))).mappings().first()
        return _update(row) if row is not None else None

    async def _cold_boot_heard(self, node: str, told: Told) -> None:
        if told.phase in FINAL and told.generation:
            mine = (nodes.c.id == node) & (nodes.c.cold_boot_generation == told.generation)
            await self._c.execute(update(nodes).where(mine).values(cold_boot_at=None))

    async def progress(self, rows: list[dict[str, Any]]) -> None:
        """Each {b_node, b_generation, b_slot, b_done, b_total, b_fetched, b_reused}. Bytes never go back."""
        mine = (_S.node == bindparam("b_node")) & (_S.generation == bindparam("b_generation"))
        counts = {name: _greater(name) for name in ("done", "total", "fetched", "reused")}
        slot: BindParameter[str] = bindparam("b_slot")
        changed = (
            update(system_updates).where(mine).values(slot=case((slot == "", _S.slot), else_=slot), **counts)
        )
        await self._c.execute(changed, rows)

    async def waiting(self) -> set[str]:
        """The nodes for which an update is open, or a cold boot is wanted."""
        rows = await self._c.execute(select(_S.node).where(_S.state == OPEN).union(
            select(nodes.c.id).where(nodes.c.cold_boot_at.is_not(None))
        ))  # fmt: skip
        return {row[0] for row in rows}


def _greater(name: str) -> ColumnElement[int]:
    new: BindParameter[int] = bindparam(f"b_{name}")
    return case((_S[name] < new, new), else_=_S[name])


def _columns(one: Update) -> dict[str, Any]:
    return asdict(one) | {"override": int(one.override), "activated": int(one.activated)}


def _update(row: Any) -> Update:
    values = {name: row[name] for name in _NAMES}
    return Update(**values | {"override": bool(row["override"]), "activated": bool(row["activated"])})
