"""What operators order: jobs and restarts, for as many nodes as a selector names, and what came of them.

Who is meant is settled when the order is made; who joins the group later is not, and who leaves it stays in.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import msgspec

from instar.core.errors import InputError
from instar.wire.messages import MAX_FRAME
from instar_server.bus.api import FLEET, Bus, Message, order_topic
from instar_server.domain.errors import Conflict, NotFound
from instar_server.domain.orders import COMMAND, JOB, OPEN, Rules, State, resend_gap
from instar_server.domain.selectors import Selector, check
from instar_server.services.delivery import Delivery
from instar_server.services.history import History, server_entry
from instar_server.services.ports import Chance, Modules, Now
from instar_server.services.presence import Presence
from instar_server.storage.connection import Connection
from instar_server.storage.database import Database
from instar_server.storage.events import Events
from instar_server.storage.orders import Orders as Stored
from instar_server.storage.rows import OrderRow
from instar_server.storage.selected import Selected

T = TypeVar("T")
BUILT_IN = frozenset({"selftest"})  # modules that ride in every program
MOST_ARGS = MAX_FRAME // 2  # bytes of JSON
PAGE_BYTES = 8 * 1024 * 1024  # of results in one answer
PAGE_ROWS = 1000
MAX_WAIT_S = 300.0
LINKED = 20  # nodes of an unknown or revoked selector that are named


@dataclass(frozen=True, slots=True)
class JobOrder:
    """`version` '': the newest that is published. Seconds: `deadline_s` for one run, `lapse_s` until it may
    not begin any more."""

    module: str
    selector: Selector
    args: dict[str, Any] = field(default_factory=dict)
    version: str = ""
    deadline_s: float = 30.0
    lapse_s: float = 86_400.0


@dataclass(frozen=True, slots=True)
class RestartOrder:
    """`modules`: those alone; none: all of them. `agent`: the agent too. `within_s` is for the whole of it."""

    selector: Selector
    modules: list[str] = field(default_factory=list)
    agent: bool = False
    within_s: float = 30.0
    lapse_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class OrderView:
    """`counts`: rows by state. `next`: where the next page of rows begins; None: there is none."""

    order: OrderRow
    counts: dict[str, int]
    rows: list[dict[str, Any]]
    next: str | None

    @property
    def open(self) -> int:
        return sum(self.counts.get(state, 0) for state in OPEN)


class Orders:
    def __init__(
        self,
        database: Database,
        bus: Bus,
        presence: Presence,
        modules: Modules,
        delivery: Delivery,
        now: Now,
        chance: Chance,
        limits: Rules,
    ) -> None:
        self._database, self._bus, self._presence, self._modules = database, bus, presence, modules
        self._delivery, self._now, self._chance, self._limits = delivery, now, chance, limits
        self._watches: set[Watch] = set()

    # ---- making

    async def job(self, wanted: JobOrder, by: str, wait_s: float = 0.0) -> OrderView:
        """Order a job; with `wait_s`, wait so long for all its rows to end.

        Raises InputError `unknown-module`, `bad-args`, `bad-selector`, `no-nodes`; NotFound `unknown-node`,
        `unknown-group`; Conflict `node-revoked`.
        """
        check(wanted.selector)
        version, digest, target = self._resolve(wanted.module, wanted.version)
        args = encode_args(wanted.args)
        now = self._now()
        order = OrderRow(
            f"o-{self._chance(12)}", JOB, wanted.module, version, digest, target, args,
            json.dumps(wanted.selector.as_json()), 0, wanted.deadline_s, now + wanted.lapse_s, now, by,
        )  # fmt: skip
        return await self._make(order, wanted.selector, wait_s)

    def _resolve(self, module: str, version: str) -> tuple[str, str, str]:
        found = self._modules.find(module, version)
        if found is not None:
            return found.version, found.digest, found.target
        if module in BUILT_IN and not version:
            return "", "", ""
        named = f"{module} {version}".strip()
        raise InputError("unknown-module", f"cannot order a job: {named[:128]} is not a published module")

    async def restart(self, wanted: RestartOrder, by: str, wait_s: float = 0.0) -> OrderView:
        """Order a restart; otherwise as `job`. It stands in the history of every node that it is for."""
        check(wanted.selector)
        now = self._now()
        type_ = "restart-agent" if wanted.agent else "restart-module"
        order = OrderRow(
            f"o-{self._chance(12)}", COMMAND, type_, "", "", "",
            json.dumps({"modules": list(dict.fromkeys(wanted.modules)), "args": {}}),
            json.dumps(wanted.selector.as_json()), 0, wanted.within_s, now + wanted.lapse_s, now, by,
        )  # fmt: skip
        return await self._make(order, wanted.selector, wait_s)

    async def _make(self, order: OrderRow, selector: Selector, wait_s: float) -> OrderView:
        connected = self._presence.get

        async def write(connection: Connection) -> tuple[OrderRow, list[dict[str, Any]]]:
            nodes = await _meant(Selected(connection), selector)
            whole = OrderRow(**{**asdict(order), "nodes": len(nodes)})
            ids = self._chance(12 * len(nodes))
            rows = [
                self._row(f"j-{ids[24 * n : 24 * n + 24]}", node, connected(node) is not None, order)
                for n, node in enumerate(nodes)
            ]
            await Stored(connection).add(whole, rows)
            if order.kind == COMMAND:
                for row in rows:
                    entry = _asked(order, row["id"])
                    await Events(connection).append(row["node"], History.SERVER, [entry], order.made)
            return whole, rows

        watch, kept = Watch(self._bus, order.id), self._delivery.keep(order.id, PAGE_BYTES)
        try:
            whole, rows = await self._database.write_at_once(write)
            common = asdict(whole) | {"order_id": order.id}
            self._delivery.send_new({**common, **row} for row in rows)
            body = {"kind": "order", "order": order.id, "name": order.name, "nodes": len(rows)}
            self._bus.publish(FLEET, body | {"by": order.made_by})
            if wait_s > 0:
                self._watches.add(watch)
                await watch.all_ended({row["id"] for row in rows}, min(wait_s, MAX_WAIT_S))
            if len(kept.rows) == len(rows) <= PAGE_ROWS:
                return _ended_view(whole, kept.rows.values())
        finally:
            self._watches.discard(watch)
            watch.close()
            self._delivery.unkeep(order.id)
        return await self.view(order.id)

    def _row(self, id_: str, node: str, connected: bool, order: OrderRow) -> dict[str, Any]:
        """Stored as sent where the node is there, before it is: that it has come is known by `taken` alone."""
        row = {"id": id_, "node": node, "state": State.QUEUED, "sends": 0, "sent_at": None}
        if not connected:
            return row | {"due_at": order.lapse_at}
        due_at = min(order.made + resend_gap(id_, 1, self._limits), order.lapse_at)
        return row | {"state": State.SENT, "sends": 1, "sent_at": order.made, "due_at": due_at}

    # ---- looking

    async def view(self, id_: str, after: str = "", limit: int = PAGE_ROWS) -> OrderView:
        """An order with a page of its rows, by node. Raises NotFound `unknown-order`."""

        async def read(connection: Connection) -> OrderView | None:
            stored = Stored(connection)
            order = await stored.get(id_)
            if order is None:
                return None
            rows, more = await stored.rows(id_, after, limit, PAGE_BYTES)
            if after or more:  # noqa: SIM108  a line each
                counts = (await stored.counts([id_]))[id_]
            else:
                counts = dict(Counter(row["state"] for row in rows))
            return OrderView(order, counts, rows, rows[-1]["node"] if more else None)

        return _found(await self._database.read_at_once(read), id_)

    async def page(self, before: str, limit: int, kind: str | None) -> list[OrderView]:
        """Orders without their rows, newest first."""

        async def read(connection: Connection) -> list[OrderView]:
            stored = Stored(connection)
            found = await stored.page(before, limit, kind)
            counts = await stored.counts([order.id for order in found])
            return [OrderView(order, counts[order.id], [], None) for order in found]

        return await self._database.read_at_once(read)

    async def states(self, id_: str) -> list[tuple[str, str, str]]:
        """(row, node, state) of every row of an order. Raises NotFound."""
        states = await self._database.read_at_once(lambda c: Stored(c).states(id_))
        return _found(states or None, id_)

    # ---- cancelling

    async def cancel(self, id_: str, by: str) -> OrderView:
        """Cancel what has not ended: at once what no node has taken; the others are told, and end by their
        result. Again is no error. Raises NotFound."""
        now = self._now()

        async def write(connection: Connection) -> tuple[OrderRow | None, list[Any], list[Any]]:
            untaken, held = await Stored(connection).cancel(id_, now, by)
            return await Stored(connection).get(id_), untaken, held

        self._delivery.unkeep(id_)
        order, untaken, held = await self._database.write_at_once(write)
        common = asdict(_found(order, id_)) | {"order_id": id_}
        rows = [{**common, "id": row.id, "node": row.node} for row in untaken]
        for row in rows:
            text = f"cancelled by {by} before the node had taken it"
            self._delivery.concluded(row, State.CANCELLED, "cancelled", text, now)
        sent = [{**common, "id": row.id, "node": row.node} for row in untaken if row.state == State.SENT]
        self._delivery.send_cancels([*sent, *({**common, "id": row.id, "node": row.node} for row in held)])
        return await self.view(id_)

    async def forget(self, before: float) -> int:
        """Delete old orders that have ended."""
        return await self._database.write_at_once(lambda c: Stored(c).forget(before))

    def close(self) -> None:
        """Answer everybody who waits."""
        for watch in self._watches:
            watch.ring()


class Watch:
    """Hears which rows of an order end; there before the first of them can."""

    def __init__(self, bus: Bus, order: str) -> None:
        self._bell, self._ended = asyncio.Event(), set[str]()
        self._count = 0
        self._subscription = bus.subscribe(order_topic(order), self._hear)

    def _hear(self, message: Message) -> None:
        if message.body.get("ended"):
            self._ended.add(message.body["id"])
            if len(self._ended) == self._count:
                self._bell.set()

    async def all_ended(self, rows: set[str], within_s: float) -> None:
        """Return when all of `rows`, which are all there are, have ended, or after `within_s` seconds."""
        self._count = len(rows)
        if self._ended >= rows:
            return
        try:
            async with asyncio.timeout(within_s):
                await self._bell.wait()
        except TimeoutError:
            return

    def ring(self) -> None:
        self._bell.set()

    def close(self) -> None:
        self._subscription.close()


async def _meant(selected: Selected, selector: Selector) -> list[str]:
    """The nodes of a selector. Raises NotFound, Conflict, InputError."""
    if selector.nodes:
        found = await selected.named(selector.nodes)
        missing = [node for node in selector.nodes if node not in found]
        if missing:
            raise NotFound(
                "unknown-node", f"cannot order: there is no node {', '.join(missing[:LINKED])[:400]}"
            )
        revoked = [node for node, is_ in found.items() if is_]
        if revoked:
            raise Conflict("node-revoked", f"cannot order: revoked are {', '.join(revoked[:LINKED])[:400]}")
    if selector.group and not await selected.group_exists(selector.group):
        raise NotFound("unknown-group", f"cannot order: there is no group {selector.group[:63]}")
    nodes = await selected.nodes(selector)
    if not nodes:
        raise InputError("no-nodes", "cannot order: no node is what was asked for")
    return nodes


def _ended_view(order: OrderRow, rows: Iterable[dict[str, Any]]) -> OrderView:
    """What `view` would find, of an order whose rows have all ended by their nodes' word and were kept."""
    by_node = sorted(rows, key=lambda row: str(row["node"]))
    return OrderView(order, dict(Counter(row["state"] for row in by_node)), by_node, None)


def _asked(order: OrderRow, row: str) -> dict[str, Any]:
    modules = ", ".join(json.loads(order.args)["modules"]) or "all modules"
    text = f"{order.name} ({modules}) asked by {order.made_by} in order {order.id}"
    return server_entry(f"restart-asked:{row}", "restart-asked", order.made, "restart-asked", text[:2000])


def encode_args(args: dict[str, Any]) -> str:
    """A job's arguments as JSON. Raises InputError `bad-args`."""
    try:
        data = msgspec.json.encode(args)
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError("bad-args", f"cannot use the arguments: {str(error)[:200]}") from None
    if len(data) > MOST_ARGS:
        raise InputError(
            "bad-args", f"cannot use the arguments: expected at most {MOST_ARGS} bytes, got {len(data)}"
        )
    return data.decode()


def _found(value: T | None, id_: str) -> T:
    if value is None:
        raise NotFound("unknown-order", f"cannot find order {id_[:40]}: there is none with this id")
    return value
