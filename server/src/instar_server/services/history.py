"""The nodes' time lines: what they tell of their transactions, and what the server did to them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from instar.core.errors import InputError
from instar_server.bus.api import FLEET, Bus, system_topic
from instar_server.domain import history, names, systems
from instar_server.domain.errors import NotFound
from instar_server.domain.systems import Told
from instar_server.services.ports import Now
from instar_server.storage.database import Database
from instar_server.storage.events import Events
from instar_server.storage.nodes import Nodes
from instar_server.storage.systems import SystemUpdates

MAX_EVENTS = 500  # in one request
PAGE = 1000
_ID = re.compile(r"([0-9A-Za-z][0-9A-Za-z._-]{0,99}):([0-9]{1,9})")

Word = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
LINE = r"^[a-z][a-z0-9-]{0,31}$|" + names.LINE_PATTERN
Text64 = Annotated[str, msgspec.Meta(max_length=64)]
Tx = Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z][0-9A-Za-z._-]{0,99}$")]


class Reason(msgspec.Struct, frozen=True):
    code: Text64 = ""
    text: Annotated[str, msgspec.Meta(max_length=16_384)] = ""


class NodeEvent(msgspec.Struct, frozen=True):
    """One event as a node sends it (docs/protocol.md)."""

    id: Annotated[str, msgspec.Meta(max_length=120)]
    tx: Tx
    line: Annotated[str, msgspec.Meta(pattern=LINE, max_length=names.MOST_LINE)]
    phase: Word
    version: Text64
    digest: Annotated[str, msgspec.Meta(max_length=96)]
    wall: Annotated[float, msgspec.Meta(ge=0, le=1e11)]
    from_version: Text64 = ""
    reason: Reason = Reason()
    boot_id: Text64 = ""
    # Of the wish that it is about (0: none, or a node that does not say); of a system image: where to, and how.
    generation: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)] = 0
    slot: Annotated[str, msgspec.Meta(max_length=8)] = ""
    mode: Annotated[str, msgspec.Meta(max_length=16)] = ""

    @property
    def number(self) -> int:
        return int(self.id.rpartition(":")[2])


@dataclass(frozen=True, slots=True)
class Whole:
    """Whether a history is as it was written; `fault` names the first entry that is not.

    `removed`: so many of the oldest entries were removed for their age.
    """

    ok: bool
    entries: int
    fault: str
    removed: int


def server_entry(
    id_: str,
    phase: str,
    now: float,
    code: str,
    text: str,
    line: str = "",
    version: str = "",
    digest: str = "",
) -> dict[str, Any]:
    """An entry about what the server did."""
    return {
        "id": id_, "tx": "", "line": line, "phase": phase, "version": version, "digest": digest,
        "from_version": "", "reason_code": code, "reason_text": text, "wall": now, "boot_id": "",
    }  # fmt: skip


def restart_ended(
    id_: str, type_: str, by: str, ok: bool, code: str, text: str, now: float
) -> dict[str, Any]:
    """An entry about what came of a restart."""
    told = f"{type_[:32]} asked by {by[:64]}: {text or code or 'done'}"[:2000]
    phase = "restarted" if ok else "restart-failed"
    return server_entry(f"restart-ended:{id_}", phase, now, "" if ok else code[:64] or "failed", told)


class History:
    NODE, SERVER = "node", "server"

    def __init__(self, database: Database, bus: Bus, now: Now) -> None:
        self._database, self._bus, self._now = database, bus, now

    async def store(self, node: str, events: list[NodeEvent]) -> list[str]:
        """Store what a node tells; ids that are stored already are no error. All ids, once durable.

        Raises InputError `bad-event`, `too-many-events`.
        """
        if len(events) > MAX_EVENTS:
            raise InputError(
                "too-many-events", f"cannot store: expected at most {MAX_EVENTS}, got {len(events)}"
            )
        entries = [_entry(event) for event in events]
        now = self._now()
        async with self._database.write() as connection:
            new = await Events(connection).append(node, self.NODE, entries, now)
            ids = {row["id"] for row in new}
            told = [_told(event) for event in events if event.id in ids and event.line == systems.LINE]
            if new:
                await self._move_on(Nodes(connection), node, events, ids, now)
            if told:
                await SystemUpdates(connection).heard(node, told, now)
        self._publish(new)
        if told:
            self._bus.publish(system_topic(node), {"node": node})
        return [event.id for event in events]

    async def note(self, node: str, *entries: dict[str, Any]) -> None:
        """Add what the server did or saw, each id once. Raises SQLAlchemyError."""
        now = self._now()
        async with self._database.write() as connection:
            new = await Events(connection).append(node, self.SERVER, list(entries), now)
        self._publish(new)

    def _publish(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            told = {name: row[name] for name in (*history.FIELDS, *history.LATER, "hash")}
            self._bus.publish(FLEET, {"kind": "event", **told})

    async def _move_on(
        self, nodes: Nodes, node: str, events: list[NodeEvent], new: set[str], now: float
    ) -> None:
        """Keep the newest step of the newest transaction with the node, for lists."""
        row = await nodes.get(node)
        last = [event for event in events if event.id in new][-1]
        if row and row.columns["tx"] == last.tx and row.columns["tx_n"] > last.number:
            return  # a later step of the same transaction was stored before this one
        await nodes.set(
            node,
            tx=last.tx, tx_n=last.number, tx_line=last.line, tx_phase=last.phase, tx_version=last.version,
            tx_reason_code=last.reason.code, tx_reason_text=last.reason.text[:2000], tx_at=now,
        )  # fmt: skip

    async def latest(self, node: str, limit: int) -> list[dict[str, Any]]:
        """Newest first. Raises NotFound."""
        async with self._database.read() as connection:
            if await Nodes(connection).get(node) is None:
                raise NotFound("unknown-node", f"cannot show {node}: there is no such node")
            return await Events(connection).latest(node, limit)

    async def check(self, node: str) -> Whole:
        """Check a node's whole chain. Raises NotFound."""
        async with self._database.read() as connection:
            row = await Nodes(connection).get(node)
            if row is None:
                raise NotFound("unknown-node", f"cannot check {node}: there is no such node")
            entries: list[dict[str, Any]] = []
            while page := await Events(connection).of_node(node, entries[-1]["n"] if entries else 0, PAGE):
                entries += page
        start_n, start = row.columns["chain_start_n"], row.columns["chain_start_hash"]
        fault = history.first_fault(node, entries, row.chain_n, row.chain_hash, start_n, start)
        return Whole(fault is None, len(entries), fault.text if fault else "", start_n)


def _entry(event: NodeEvent) -> dict[str, Any]:
    match = _ID.fullmatch(event.id)
    if match is None or match[1] != event.tx:
        raise InputError("bad-event", f"cannot store event {event.id[:120]!r}: expected id <tx>:<number>")
    return {
        "id": event.id, "tx": event.tx, "line": event.line, "phase": event.phase, "version": event.version,
        "digest": event.digest, "from_version": event.from_version, "reason_code": event.reason.code,
        "reason_text": event.reason.text, "wall": event.wall, "boot_id": event.boot_id,
        "generation": event.generation, "slot": event.slot, "mode": event.mode,
    }  # fmt: skip


def _told(event: NodeEvent) -> Told:
    reason = event.reason
    return Told(
        event.tx, event.number, event.generation, event.phase, reason.code, reason.text[:2000], event.slot,
        event.digest,
    )  # fmt: skip
