"""The way of orders to the nodes and of their answers back.

At least once: a row is sent when it is made and its node is connected, when its node comes, and again
until the node says `taken`; the node sees to it that it runs once. The truth is in the database; what is kept here
in memory (who may say what, the tails of outputs) is learnt anew from it when a node comes.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from instar.wire.messages import CommandStatus, Output, Result
from instar_server.bus.api import AGENTS, Bus, order_topic
from instar_server.domain import orders as rules
from instar_server.domain.orders import OPEN, Do, Event, Rules, State, Step
from instar_server.services.frames import frame_of
from instar_server.services.history import History, restart_ended
from instar_server.services.lastwords import LastWords
from instar_server.services.ports import Now
from instar_server.services.presence import Presence
from instar_server.storage.connection import Connection
from instar_server.storage.database import Database
from instar_server.storage.events import Events
from instar_server.storage.marks import Marks
from instar_server.storage.orders import MOST_OF_NODE, Orders, decidable
from instar_server.storage.rows import Word

log = logging.getLogger(__name__)

NODES_AT_ONCE = 500
DUE_AT_ONCE = 500
SMALL_REPLY = 4096  # bytes: larger ones are not shown to those who watch, they can ask for them
MAX_ID = 40
TEXT = 2000  # characters of a reason
FINAL = frozenset({"success", "failure", "timeout"})

_Step = tuple[Step, dict[str, Any]]


class Known:
    """An open row of a node that is, or was, connected."""

    __slots__ = ("deadline_s", "kind", "lapse_at", "node", "order", "said", "state", "tail")

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.order, self.node, self.kind = row["order_id"], row["node"], row["kind"]
        self.deadline_s, self.lapse_at = float(row["deadline_s"]), float(row["lapse_at"])
        self.state = State(row["state"])
        self.tail = str(row.get("output", ""))
        self.said = 0


class Kept:
    """Rows of one order, as they were stored when they ended. `room`: bytes of results that may still come."""

    def __init__(self, room: int) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.room = room


class Delivery:
    """`run` until cancelled. `dropped` counts what nodes said of rows that are not theirs, or not open."""

    def __init__(self, database: Database, bus: Bus, presence: Presence, now: Now, limits: Rules) -> None:
        self._database, self._bus, self._presence, self._now = database, bus, presence, now
        self._rules = limits
        self._marks, self._words = Marks(database), LastWords(database, now)
        self._known: dict[str, Known] = {}
        self._of_node: dict[str, set[str]] = {}
        self._fresh: set[str] = set()  # nodes that have come
        self._more: set[str] = set()  # nodes that have more rows than were handed out
        self._refill: set[str] = set()
        self._wake = asyncio.Event()
        self._kept: dict[str, Kept] = {}  # by order
        self.dropped: Counter[str] = Counter()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for part in (self._marks.run, self._words.run, self._come, self._due):
                group.create_task(part())

    async def close(self) -> None:
        await self._marks.close()

    # ---- out

    def send_new(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Send rows that have just been stored, to the nodes that are connected."""
        now = self._now()
        for row in rows:
            if self._presence.get(row["node"]) is None:
                continue
            if row["state"] == State.QUEUED:  # its node has come while it was stored
                self.joined(row["node"])
            elif row["node"] not in self._more:  # else it waits its turn behind what is older
                self._know(row)
                self._send(row, now)

    def send_cancels(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Tell nodes that rows of theirs are cancelled; those that are away hear it when they come."""
        now = self._now()
        for row in rows:
            self._send(row, now)

    def _send(self, row: Mapping[str, Any], now: float) -> None:
        self._bus.publish(AGENTS, {"do": "send", "node": row["node"], "frame": frame_of(row, now)})

    def joined(self, node: str) -> None:
        """A node has come: it gets what is open for it."""
        self._fresh.add(node)
        self._wake.set()

    async def _come(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            refill, self._refill = self._refill, set()
            nodes = sorted(node for node in self._fresh | refill if self._presence.get(node) is not None)
            fresh, self._fresh = self._fresh, set()
            for start in range(0, len(nodes), NODES_AT_ONCE):
                part = nodes[start : start + NODES_AT_ONCE]
                try:
                    if refill:
                        await self._marks.flush()
                    await self._hand_out(part, fresh)
                except SQLAlchemyError as error:
                    log.error("cannot see what is open for %d nodes: %s", len(part), error)
                    self._later(part, fresh)

    def _later(self, nodes: list[str], fresh: set[str]) -> None:
        self._fresh |= fresh.intersection(nodes)
        self._refill |= set(nodes) - fresh
        asyncio.get_running_loop().call_later(5.0, self._wake.set)

    async def _hand_out(self, nodes: list[str], fresh: set[str]) -> None:
        now = self._now()
        rows = await self._database.read_at_once(lambda c: Orders(c).of_nodes(nodes, now))
        counts = Counter(row["node"] for row in rows)
        for node in nodes:
            (self._more.add if counts[node] >= MOST_OF_NODE else self._more.discard)(node)
        # What a refill finds again was sent on this very channel.
        new = [row for row in rows if row["node"] in fresh or row["id"] not in self._known]
        await self._do([(rules.decide_joined(decidable(row), now, self._rules), row) for row in new], now)

    async def _due(self) -> None:
        while True:
            try:
                while await self.due_round() == DUE_AT_ONCE:
                    pass
            except SQLAlchemyError as error:
                log.error("cannot see which orders are due: %s", error)
            await asyncio.sleep(min(1.0, self._rules.resend_s / 4))

    async def due_round(self) -> int:
        """Decide about rows that are due; how many there were."""
        now = self._now()
        rows = await self._database.read_at_once(lambda c: Orders(c).due(now, DUE_AT_ONCE))
        steps = [
            (rules.decide(decidable(row), self._presence.get(row["node"]) is not None, now, self._rules), row)
            for row in rows
        ]
        await self._do(steps, now)
        return len(rows)

    async def _do(self, steps: list[_Step], now: float) -> None:
        """Write what was decided, then do it."""
        if not steps:
            return
        changing = [(step, row) for step, row in steps if row["state"] in OPEN]

        async def write(connection: Connection) -> dict[str, _Step]:
            return await _write(Orders(connection), changing, now)

        ended = await self._database.write_at_once(write) if changing else {}
        for step, row in ended.values():
            self.concluded(row, rules.target(step.event or Event.LOSE), step.code, step.text, now)
        for step, row in steps:
            if step.do is not Do.END and row["state"] in OPEN and self._presence.get(row["node"]) is not None:
                self._know(row)
            if step.do is Do.SEND:
                self._send(row, now)

    # ---- back

    def taken(self, node: str, id_: str) -> None:
        known = self._mine(node, id_, "taken")
        if known is None or known.state not in rules.sources(Event.TAKEN):
            return
        now = self._now()
        known.state = State.TAKEN
        self._marks.put(Event.TAKEN, id_, node, taken_at=now, due_at=self._ask_at(known, now))
        self._tell(known.order, id_, node, State.TAKEN, now)
        self._perhaps_more(node)

    def _begun(self, node: str, id_: str, known: Known) -> None:
        if known.state not in rules.sources(Event.BEGUN):
            return
        now = self._now()
        known.state = State.RUNNING
        self._marks.put(Event.BEGUN, id_, node, started_at=now, due_at=self._ask_at(known, now))
        self._tell(known.order, id_, node, State.RUNNING, now)

    def output(self, node: str, output: Output) -> None:
        """Keep its tail, and show it to whoever watches."""
        known = self._mine(node, output.id, "output")
        if known is None or output.kind not in ("log", "progress"):
            return
        self._begun(node, output.id, known)
        known.said += 1
        if output.text:
            known.tail = rules.tail(known.tail, output.text + "\n")
        body = {"kind": "output", "id": output.id, "node": node, "seq": output.seq, "what": output.kind}
        body |= {"text": output.text[: rules.TAIL], "fraction": output.fraction}
        self._bus.publish(order_topic(known.order), body)

    async def result(self, node: str, result: Result) -> bool:
        """Store what came of a job. True once it is durable, also when it had been stored before; False when
        this node has no such row. Raises SQLAlchemyError."""
        code = "" if result.ok else result.code[:64] or "failed"
        if code == rules.NOT_NOW and await self._refused(node, result):
            return True
        reply = msgspec.json.encode(result.reply)
        body = msgspec.json.encode(result).decode()
        return await self._word(node, result.id, result.ok, code, result.reason, body, reply)

    async def _refused(self, node: str, result: Result) -> bool:
        """The node has no room for a job: it is sent again until it has, or the job lapses."""
        id_, text = result.id[:MAX_ID], result.reason[:TEXT]
        if not await self._database.write_at_once(lambda c: Orders(c).refused(id_, node, text)):
            return False
        known = self._known.get(id_)
        if known is not None:
            self._tell(known.order, id_, node, known.state, self._now(), code=rules.NOT_NOW, text=text[:500])
        return True

    async def status(self, node: str, status: CommandStatus) -> bool:
        """Note where a command stands; a final status is stored as `result` does it."""
        id_ = status.id[:MAX_ID]
        if status.origin.startswith("local:"):
            return status.status not in FINAL or await self._local(node, status)
        if status.status in ("pending", "in-progress"):
            known = self._mine(node, id_, "command-status")
            if known is not None and status.status == "pending":
                self.taken(node, id_)
            elif known is not None:
                self._begun(node, id_, known)
            return True
        ok = status.status == "success"
        code = "" if ok else status.code[:64] or status.status[:64]
        reply = {"status": status.status, "modules": status.modules, "origin": status.origin}
        seconds = round(max(status.ended - status.asked, 0.0), 3)  # by the node's clock, which may have leapt
        told = {"ok": ok, "code": code, "reason": status.text, "seconds": seconds, "reply": reply}
        body = msgspec.json.encode(told).decode()
        return await self._word(node, id_, ok, code, status.text, body, msgspec.json.encode(reply))

    async def _local(self, node: str, status: CommandStatus) -> bool:
        """A restart that somebody asked for on the node itself stands in its history."""
        ok, now, id_ = status.status == "success", self._now(), status.id[:MAX_ID]
        entry = restart_ended(id_, status.type, status.origin, ok, status.code, status.text, now)
        await self._database.write_at_once(lambda c: Events(c).append(node, History.SERVER, [entry], now))
        return True

    async def _word(
        self, node: str, id_: str, ok: bool, code: str, text: str, body: str, reply: bytes
    ) -> bool:
        known = self._known.get(id_)
        tail = known.tail if known is not None and known.node == node else ""
        word = Word(id_[:MAX_ID], node, ok, code, text[:TEXT], body, tail)
        stored = await self._words.store(word)
        if stored is None:
            self.dropped["result"] += 1
            return False
        self._forget(id_)
        if stored.new:
            self._keep(stored.order, stored.row)
            state = rules.target(rules.word_of(ok, code))
            small = msgspec.json.decode(reply) if len(reply) <= SMALL_REPLY else None
            more = {"ok": ok, "code": code, "text": word.text[:500], "reply": small, "ended": stored.ended}
            self._tell(stored.order, id_, node, state, self._now(), **more)
        return True

    def concluded(self, row: Mapping[str, Any], state: State, code: str, text: str, now: float) -> None:
        """A row that was open has ended without its node's word, and that is stored."""
        self._forget(row["id"])
        self._tell(row["order_id"], row["id"], row["node"], state, now, code=code, text=text, ended=True)

    # ---- in memory

    def keep(self, order: str, most_bytes: int) -> Kept:
        """Keep the rows of an order that end by their nodes' word, for who waits for them, until `unkeep`."""
        self._kept[order] = kept = Kept(most_bytes)
        return kept

    def unkeep(self, order: str) -> None:
        """Also when something else happens to the order: what is in the database is asked for then."""
        kept = self._kept.pop(order, None)
        if kept is not None:
            kept.rows = {}

    def _keep(self, order: str, row: dict[str, Any]) -> None:
        kept = self._kept.get(order)
        if kept is not None:
            kept.room -= len(row["result"])
            if kept.room < 0:
                self.unkeep(order)
            else:
                kept.rows[row["id"]] = row

    def _know(self, row: Mapping[str, Any]) -> None:
        known = self._known.get(row["id"])
        if known is None:
            self._known[row["id"]] = Known(row)
            self._of_node.setdefault(row["node"], set()).add(row["id"])

    def _mine(self, node: str, id_: str, what: str) -> Known | None:
        known = self._known.get(id_)
        if known is None or known.node != node:
            self.dropped[what] += 1
            return None
        return known

    def _forget(self, id_: str) -> None:
        self._marks.drop(id_)
        known = self._known.pop(id_, None)
        if known is not None:
            mine = self._of_node[known.node]
            mine.discard(id_)
            if not mine:
                del self._of_node[known.node]
            self._perhaps_more(known.node)

    def _perhaps_more(self, node: str) -> None:
        """Hand out more rows to a node that has worked off most of what it had got."""
        if node in self._more and len(self._of_node.get(node, ())) < MOST_OF_NODE / 2:
            self._more.discard(node)
            self._refill.add(node)
            self._wake.set()

    def _ask_at(self, known: Known, now: float) -> float:
        late_s: float = known.deadline_s + self._rules.silence_s
        return min(now + late_s, known.lapse_at + late_s)

    def _tell(self, order: str, id_: str, node: str, state: State, at: float, **more: Any) -> None:
        body = {"kind": "row", "id": id_, "node": node, "state": str(state), "at": at, "ended": False}
        self._bus.publish(order_topic(order), body | more)


async def _write(orders: Orders, steps: list[_Step], now: float) -> dict[str, _Step]:
    """Those that have ended by it, by row."""
    sent: list[dict[str, Any]] = []
    later: dict[str, float | None] = {}
    ends: dict[tuple[Event, str, str], dict[str, _Step]] = {}
    for step, row in steps:
        if step.do is Do.END and step.event is not None:
            ends.setdefault((step.event, step.code, step.text), {})[row["id"]] = (step, row)
        elif step.do is Do.SEND and row["state"] in rules.WAITING:
            sent.append(
                {
                    "id": row["id"],
                    "node": row["node"],
                    "sent_at": now,
                    "sends": row["sends"] + 1,
                    "due_at": step.due_at,
                }
            )
        else:
            later[row["id"]] = step.due_at
    if sent:
        await orders.mark(Event.SEND, sent)
    if later:
        await orders.due_again(later)
    ended: dict[str, _Step] = {}
    for (event, code, text), rows in ends.items():
        ended |= {id_: rows[id_] for id_ in await orders.conclude(event, list(rows), code, text, now)}
    return ended
