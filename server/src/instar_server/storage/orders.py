"""Orders and their rows: one row for each node that an order is for.

Which states an event counts in is the table in `domain.orders`; here it becomes the condition of an
update, so that two that come at the same time cannot both count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from sqlalchemy import Table, bindparam, delete, func, insert, literal_column, select, update

from instar_server.domain import orders as rules
from instar_server.domain.orders import OPEN, WAITING, Event, Row, State
from instar_server.storage.connection import Connection, Prepared
from instar_server.storage.rows import OrderRow, Word
from instar_server.storage.schema import nodes, order_jobs, orders

PART = 500  # names in one condition
MOST_OF_NODE = 256  # rows of one node that are handed out at once, oldest first
MARKED = {
    Event.SEND: ("sent_at", "sends", "due_at"),
    Event.TAKEN: ("taken_at", "due_at"),
    Event.BEGUN: ("started_at", "due_at"),
}
CANCEL_AGAIN_S = 86400.0  # a cancelled row that the node may have is told again for so long

# What a row of both tables needs for a decision and for its frame.
_BOTH = (
    order_jobs, orders.c.kind, orders.c.name, orders.c.version, orders.c.digest, orders.c.target, orders.c.args,
    orders.c.deadline_s, orders.c.lapse_at, orders.c.made, orders.c.made_by, orders.c.cancelled_at,
)  # fmt: skip


class Orders:
    def __init__(self, connection: Connection) -> None:
        self._c = connection

    async def add(self, order: OrderRow, rows: list[dict[str, Any]]) -> None:
        """`rows`: id, node, state, sends, sent_at and due_at of each."""
        await self._c.run(_ADD_ORDER, _bound(asdict(order)))
        await self._c.run(_ADD_ROW, [_bound({"order_id": order.id, **row}) for row in rows])

    async def get(self, id_: str) -> OrderRow | None:
        rows = await self._c.run(_ORDER, {"b_id": id_})
        return OrderRow(**rows[0]) if rows else None

    async def page(self, before: str, limit: int, kind: str | None) -> list[OrderRow]:
        """Newest first, those older than the order `before`."""
        wanted = select(orders).order_by(orders.c.made.desc(), orders.c.id.desc()).limit(limit)
        if kind is not None:
            wanted = wanted.where(orders.c.kind == kind)
        if before:
            o = orders.c
            made = select(o.made).where(o.id == before).scalar_subquery()
            wanted = wanted.where((o.made < made) | ((o.made == made) & (o.id < before)))
        return [OrderRow(**row) for row in (await self._c.execute(wanted)).mappings()]

    async def counts(self, ids: list[str]) -> dict[str, dict[str, int]]:
        """How many rows of each order are in which state."""
        j, found = order_jobs.c, {id_: dict[str, int]() for id_ in ids}
        counted = select(j.order_id, j.state, func.count()).where(j.order_id.in_(ids))
        for id_, state, count in await self._c.execute(counted.group_by(j.order_id, j.state)):
            found[id_][state] = count
        return found

    async def rows(
        self, id_: str, after: str, limit: int, most_bytes: int
    ) -> tuple[list[dict[str, Any]], bool]:
        """Rows of an order by node, those after node `after`: at most `limit`, and at most `most_bytes` of
        results, but always one; and whether there are more."""
        sizes = await self._c.run(_SIZES, {"b_id": id_, "b_after": after, "b_limit": limit + 1})
        last, count, room = "", 0, most_bytes
        for row in sizes[:limit]:
            if last and row["size"] > room:
                break
            last, count, room = row["node"], count + 1, room - row["size"]
        rows = await self._c.run(_ROWS, {"b_id": id_, "b_after": after, "b_last": last})
        return rows, count < len(sizes)

    async def states(self, id_: str) -> list[tuple[str, str, str]]:
        """(row, node, state) of all rows of an order."""
        j = order_jobs.c
        wanted = select(j.id, j.node, j.state).where(j.order_id == id_).order_by(j.node)
        return [(row.id, row.node, row.state) for row in await self._c.execute(wanted)]

    # ---- what is to be sent

    async def of_nodes(self, ids: list[str], now: float) -> list[dict[str, Any]]:
        """What these nodes, which have come, should hear of: open rows, and cancelled ones that they may have."""
        j = order_jobs.c
        may_have = (
            (j.state == State.CANCELLED)
            & j.ok.is_(None)
            & j.sent_at.is_not(None)
            & (j.ended_at > now - CANCEL_AGAIN_S)
        )
        # Never more than this of one node: the others come when these are on its disk.
        turn = (j.state == State.CANCELLED, orders.c.made, j.id)
        place = func.row_number().over(partition_by=j.node, order_by=turn).label("place")
        mine = select(*_BOTH, place).join(orders, orders.c.id == j.order_id)
        mine = mine.where(
            j.node.in_(ids), j.state.in_([*OPEN, State.CANCELLED]), j.state.in_(OPEN) | may_have
        )
        inner = mine.subquery()
        wanted = select(inner).where(inner.c.place <= MOST_OF_NODE).order_by(inner.c.made, inner.c.id)
        return [dict(row) for row in (await self._c.execute(wanted)).mappings()]

    async def due(self, now: float, limit: int) -> list[dict[str, Any]]:
        """Rows about which something is to be decided, with `revoked_at` of their nodes."""
        j = order_jobs.c
        wanted = select(*_BOTH, nodes.c.revoked_at).join(orders, orders.c.id == j.order_id)
        wanted = (
            wanted.join(nodes, nodes.c.id == j.node).where(j.due_at <= now).order_by(j.due_at).limit(limit)
        )
        return [dict(row) for row in (await self._c.execute(wanted)).mappings()]

    async def make_due(self, node: str, now: float) -> int:
        """Decide about all open rows of a node at the next round."""
        j = order_jobs.c
        mine = update(order_jobs).where(j.node == node, j.state.in_(OPEN))
        return await self._c.change(mine.values(due_at=now))

    # ---- what has happened

    async def mark(self, event: Event, rows: list[dict[str, Any]]) -> None:
        """Note an event about rows: for each its `id`, `node`, and the columns that MARKED names."""
        await self._c.run(_MARK[event], [_bound(row) for row in rows])

    async def refused(self, id_: str, node: str, text: str) -> bool:
        """Note why a node would not take a row. False: it has no such row, or has taken it."""
        told = {"b_id": id_, "b_node": node, "b_text": text}
        return bool(await self._c.run(_REFUSED, told))

    async def due_again(self, rows: Mapping[str, float | None]) -> None:
        """Nothing has happened; when to look again."""
        j = order_jobs.c
        later = update(order_jobs).where(j.id == bindparam("b_id")).values(due_at=bindparam("b_due_at"))
        await self._c.execute(later, [{"b_id": id_, "b_due_at": due} for id_, due in rows.items()])

    async def conclude(self, event: Event, ids: list[str], code: str, text: str, now: float) -> list[str]:
        """End rows without the nodes' word. Those that it counted for."""
        j, ended = order_jobs.c, []
        for start in range(0, len(ids), PART):
            some = j.id.in_(ids[start : start + PART]) & j.state.in_(rules.sources(event))
            done = update(order_jobs).where(some).values(
                state=rules.target(event), code=code, text=text, ended_at=now, due_at=None
            )  # fmt: skip
            ended += [row.id for row in await self._c.execute(done.returning(j.id))]
        return ended

    async def words(self, words: list[Word], now: float) -> dict[str, dict[str, Any]]:
        """Store last words, each once. For each id that is this node's: its row as it was before, but for
        its result.

        A row whose `ok` is not null had one already: nothing was changed.
        """
        found = {row["id"]: row for word in words for row in await self._c.run(_BEFORE, {"b_id": word.id})}
        mine = {
            word.id: found[word.id]
            for word in words
            if word.id in found and found[word.id]["node"] == word.node
        }
        new = [word for word in words if word.id in mine and mine[word.id]["ok"] is None]
        if new:
            await self._c.run(_WORD, [_word_values(word, mine[word.id], now) for word in new])
        return mine

    async def cancel(self, id_: str, now: float, by: str) -> tuple[list[Any], list[Any]]:
        """Cancel what is not taken. (Rows that were not, rows that are: id, node and state.)

        Cancelling again changes nothing that has ended.
        """
        j, o = order_jobs.c, orders.c
        first = update(orders).where(o.id == id_, o.cancelled_at.is_(None))
        await self._c.change(first.values(cancelled_at=now, cancelled_by=by))
        open_ = select(j.id, j.node, j.state).where(j.order_id == id_, j.state.in_(OPEN))
        rows = (await self._c.execute(open_)).all()
        untaken = [row for row in rows if row.state in WAITING]
        text = f"cancelled by {by} before the node had taken it"
        await self.conclude(Event.CANCEL, [row.id for row in untaken], "cancelled", text, now)
        return untaken, [row for row in rows if row.state not in WAITING]

    async def forget(self, before: float) -> int:
        """Delete orders made before then that have ended altogether."""
        o, j = orders.c, order_jobs.c
        mine = select(j.id).where(j.order_id == o.id)
        old = select(o.id).where(o.made < before, ~mine.where(j.due_at.is_not(None)).exists())
        await self._c.change(delete(order_jobs).where(j.order_id.in_(old)))
        return await self._c.change(delete(orders).where(o.made < before, ~mine.exists()))


def _word_update() -> Prepared:
    told = ("state", "ok", "code", "text", "result", "output", "ended_at")
    first = update(order_jobs).where(order_jobs.c.id == bindparam("b_id"), order_jobs.c.ok.is_(None))
    return Prepared(first.values({name: bindparam(f"b_{name}") for name in told} | {"due_at": None}))


def _mark(event: Event, names: Iterable[str]) -> Prepared:
    j = order_jobs.c
    # Written out, since a list as a value would be another statement for each number of values.
    states: list[Any] = [literal_column(f"'{state}'") for state in rules.sources(event)]
    counts = (j.id == bindparam("b_id")) & (j.node == bindparam("b_node")) & j.state.in_(states)
    changed: dict[str, Any] = {name: bindparam(f"b_{name}") for name in names}
    if event is not Event.SEND:
        changed |= {"code": "", "text": ""}  # whatever was refused before
    return Prepared(update(order_jobs).where(counts).values(changed | {"state": str(rules.target(event))}))


def _insert(table: Table, names: Iterable[str]) -> Prepared:
    return Prepared(insert(table).values({name: bindparam(f"b_{name}") for name in names}))


def _rows_of_order(*columns: Any) -> Any:
    j = order_jobs.c
    mine = select(*columns).where(j.order_id == bindparam("b_id"), j.node > bindparam("b_after"))
    return mine.order_by(j.node)


_ADD_ORDER = _insert(orders, orders.c.keys())
_ADD_ROW = _insert(order_jobs, ("id", "order_id", "node", "state", "sends", "sent_at", "due_at"))
_ORDER = Prepared(select(orders).where(orders.c.id == bindparam("b_id")))
_SIZE = func.coalesce(func.length(order_jobs.c.result), 0).label("size")
_SIZES = Prepared(_rows_of_order(order_jobs.c.node, _SIZE).limit(bindparam("b_limit")))
_ROWS = Prepared(_rows_of_order(order_jobs).where(order_jobs.c.node <= bindparam("b_last")))
_BEFORE = Prepared(
    select(
        *(column for column in order_jobs.c if column.name != "result"),
        *(orders.c[name] for name in ("kind", "name", "made_by")),
    )
    .join(orders, orders.c.id == order_jobs.c.order_id)
    .where(order_jobs.c.id == bindparam("b_id"))
)
_WORD = _word_update()
_REFUSED = Prepared(
    update(order_jobs)
    .where(order_jobs.c.id == bindparam("b_id"), order_jobs.c.node == bindparam("b_node"))
    .where(order_jobs.c.state.in_([literal_column(f"'{state}'") for state in WAITING]))
    .values(code=rules.NOT_NOW, text=bindparam("b_text"))
    .returning(order_jobs.c.id)
)
_MARK = {event: _mark(event, names) for event, names in MARKED.items()}


def _word_values(word: Word, row: Mapping[str, Any], now: float) -> dict[str, Any]:
    return {
        "b_id": word.id, "b_state": rules.target(rules.word_of(word.ok, word.code)), "b_ok": int(word.ok),
        "b_code": word.code, "b_text": word.text, "b_result": word.result,
        "b_output": word.output or row["output"], "b_ended_at": now,
    }  # fmt: skip


def row_after(word: Word, row: Mapping[str, Any], now: float) -> dict[str, Any]:
    """A row as it is stored, from what it was before its last word (`Orders.words`)."""
    told = {name.removeprefix("b_"): value for name, value in _word_values(word, row, now).items()}
    after = {column.name: row.get(column.name) for column in order_jobs.c} | told
    return after | {"state": str(told["state"]), "due_at": None}


def _bound(row: Mapping[str, Any]) -> dict[str, Any]:
    return {f"b_{name}": value for name, value in row.items()}


def decidable(row: Mapping[str, Any]) -> Row:
    """What `domain.orders.decide` looks at, of a row from `of_nodes` or `due`."""
    return Row(
        row["id"], row["order_id"], row["node"], State(row["state"]), row["deadline_s"], row["lapse_at"],
        row["sent_at"], row["sends"], max(row["taken_at"] or 0.0, row["started_at"] or 0.0),
        row["cancelled_at"] is not None,
        row.get("revoked_at") is not None, row["text"] if row["code"] == rules.NOT_NOW else "",
    )  # fmt: skip
