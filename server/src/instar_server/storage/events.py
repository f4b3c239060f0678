"""The nodes' histories."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import bindparam, delete, func, insert, select, update
from sqlalchemy.sql import Select

from instar_server.domain import history
from instar_server.storage.connection import Connection, Prepared
from instar_server.storage.schema import events, nodes

KEEP = 5000  # entries of one node
SLACK = 250  # more than that before the oldest are removed, so that it is seldom done

# Prepared, since a restart of ten thousand nodes makes as many entries in one transaction.
_HEAD = Prepared(
    select(nodes.c.chain_n, nodes.c.chain_hash, nodes.c.chain_start_n).where(
        nodes.c.id == bindparam("b_node")
    )
)
_KNOWN = Prepared(
    select(events.c.id).where(
        events.c.node == bindparam("b_node"),
        events.c.source == bindparam("b_source"),
        events.c.id == bindparam("b_id"),
    )
)
_COLUMNS = (*history.FIELDS, *history.LATER, "hash")
_ADD = Prepared(insert(events).values({name: bindparam(f"b_{name}") for name in _COLUMNS}))
_MOVE_ON = Prepared(
    update(nodes)
    .where(nodes.c.id == bindparam("b_node"))
    .values(chain_n=bindparam("b_n"), chain_hash=bindparam("b_hash"))
)


class Events:
    def __init__(self, connection: Connection) -> None:
        self._c = connection

    async def append(
        self, node: str, source: str, entries: list[dict[str, Any]], now: float
    ) -> list[dict[str, Any]]:
        """Add entries to a node's chain; ids that are there already are passed over. Those that were new.

        Must run inside a write transaction: the head is read, and moved on. Beyond KEEP the oldest go.
        """
        head = (await self._c.run(_HEAD, {"b_node": node}))[0]
        n, start_n = head["chain_n"], head["chain_start_n"]
        previous = head["chain_hash"] or history.genesis(node)
        known = await self._known(node, source, [entry["id"] for entry in entries])
        rows: list[dict[str, Any]] = []
        for entry in entries:
            if entry["id"] in known:
                continue
            known.add(entry["id"])
            n += 1
            row = {**history.LATER, **entry, "node": node, "source": source, "n": n, "stored_at": now}
            previous = row["hash"] = history.link(previous, row)
            rows.append(row)
        if rows:
            await self._c.run(_ADD, [{f"b_{name}": value for name, value in row.items()} for row in rows])
            await self._c.run(_MOVE_ON, {"b_node": node, "b_n": n, "b_hash": previous})
            if n - start_n > KEEP + SLACK:
                await self._remove_until(node, n - KEEP)
        return rows

    async def _remove_until(self, node: str, n: int) -> None:
        """Remove the entries up to number `n`; the chain starts behind it from now on."""
        e = events.c
        last = (await self._c.execute(select(e.hash).where(e.node == node, e.n == n))).first()
        if last is None:
            return  # somebody has tampered with it: leave what there is to be looked at
        start = update(nodes).where(nodes.c.id == node).values(chain_start_n=n, chain_start_hash=last.hash)
        await self._c.execute(start)
        await self._c.execute(delete(events).where(e.node == node, e.n <= n))

    async def _known(self, node: str, source: str, ids: list[str]) -> set[str]:
        if len(ids) == 1:  # a server's own entry
            return {
                row["id"]
                for row in await self._c.run(_KNOWN, {"b_node": node, "b_source": source, "b_id": ids[0]})
            }
        e = events.c
        found = select(e.id).where(e.node == node, e.source == source, e.id.in_(ids))
        return {row.id for row in await self._c.execute(found)}

    async def has_ended(self, node: str, tx: str, phases: Iterable[str]) -> bool:
        """Whether one of these phases was told of a transaction."""
        e = events.c
        found = select(e.seq).where(e.node == node, e.source == "node", e.tx == tx, e.phase.in_(list(phases)))
        return (await self._c.execute(found.limit(1))).first() is not None

    async def last_stored(self, node: str, tx: str) -> float | None:
        """When the newest event of a node's transaction came (unix time)."""
        e = events.c
        found = select(func.max(e.stored_at)).where(e.node == node, e.source == "node", e.tx == tx)
        newest: float | None = (await self._c.execute(found)).scalar_one()
        return newest

    async def of_node(self, node: str, after_n: int = 0, limit: int = 1000) -> list[dict[str, Any]]:
        """Oldest first, those after number `after_n`."""
        e = events.c
        return await self._rows(
            select(events).where(e.node == node, e.n > after_n).order_by(e.n).limit(limit)
        )

    async def latest(self, node: str, limit: int) -> list[dict[str, Any]]:
        """Newest first."""
        e = events.c
        return await self._rows(select(events).where(e.node == node).order_by(e.n.desc()).limit(limit))

    async def _rows(self, wanted: Select[Any]) -> list[dict[str, Any]]:
        return [dict(row) for row in (await self._c.execute(wanted)).mappings()]
