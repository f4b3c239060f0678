"""What nodes said of their operating systems: kept, passed on, and written in batches.

What is lost with the process, or with a write that fails, is said again by the next report.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, NamedTuple

from instar_server.bus.api import FLEET, Bus, system_topic
from instar_server.domain.systems import Update
from instar_server.services.ports import Now
from instar_server.services.system_reports import SystemReport, UpdateSaid
from instar_server.storage.batch import SYSTEM, Observations
from instar_server.storage.database import Database
from instar_server.storage.rows import NodeRow
from instar_server.storage.systems import SystemUpdates

TELL_EVERY_S = 0.25  # least time between two words about bytes
MOST_TOLD = 10_000  # nodes about which it is kept when they were last told of
COUNTS = ("done", "total", "fetched", "reused")  # bytes of an update


class Said(NamedTuple):
    """The newest report of a node, and when it came; {} and None: never."""

    report: dict[str, Any]
    told: float | None


class Unwritten(NamedTuple):
    """What was said of a node, and was not in the database yet at that moment."""

    columns: dict[str, Any]
    progress: dict[str, Any] | None

    def onto(self, updates: list[Update]) -> list[Update]:
        """Updates with the bytes that are still to be written."""
        if self.progress is None:
            return updates
        return [_with_unwritten(each, self.progress) for each in updates]


class SystemsSaid:
    """`flush` now and then, and at the end."""

    def __init__(self, database: Database, bus: Bus, observations: Observations, now: Now) -> None:
        self._database, self._bus, self._observations, self._now = database, bus, observations, now
        self._progress: dict[str, dict[str, Any]] = {}  # by node; to be written
        self._told: dict[str, tuple[tuple[str, str, str], float]] = {}

    def keep(self, node: str, said: SystemReport) -> None:
        """Keep a report, and pass it on. Raises InputError `report-too-large`."""
        body, now = said.kept(), self._now()
        self._observations.put(SYSTEM, node, json.dumps(body), now, now)
        if said.update is not None and said.update.generation:
            self._progress[node] = _progress_row(node, said.update, self._progress.get(node, {}))
        at = (said.update.tx, said.update.step, said.update.slot) if said.update is not None else ("", "", "")
        before, told = self._told.get(node, (("", "", ""), 0.0))
        if at == before and 0 <= now - told < TELL_EVERY_S:
            return
        self._told.pop(node, None)
        self._told[node] = (at, now)
        if len(self._told) > MOST_TOLD:
            del self._told[next(iter(self._told))]
        self._bus.publish(system_topic(node), {"node": node})
        if at != before:
            tx, step, slot = at
            self._bus.publish(FLEET, {"kind": "system", "node": node, "tx": tx, "step": step, "slot": slot})

    def unwritten(self, node: str) -> Unwritten:
        """To be asked before the database is read: a read does not see what is written after it began."""
        return Unwritten(self._observations.latest(node), self._progress.get(node))

    def newest(self, row: NodeRow, unwritten: Unwritten | None = None) -> Said:
        """What the node of a row last said, with what is, or was, not written."""
        seen = [row.columns, self._observations.latest(row.id)]
        if unwritten is not None:
            seen.append(unwritten.columns)
        told = [each for each in seen if each.get("system_at") is not None]
        if not told:
            return Said({}, None)
        newest = max(told, key=lambda each: float(each["system_at"]))
        return Said(json.loads(newest["system"]), newest["system_at"])

    async def flush(self) -> None:
        """Write how many bytes have come."""
        rows = dict(self._progress)
        if rows:
            await self._database.write_at_once(lambda c: SystemUpdates(c).progress(list(rows.values())))
        for node, row in rows.items():
            if self._progress.get(node) is row:
                del self._progress[node]


def _progress_row(node: str, said: UpdateSaid, before: dict[str, Any]) -> dict[str, Any]:
    """A row to be written. While an image is read back, its bytes count from 0 again: the most is what is kept."""
    same = before.get("b_generation") == said.generation
    counts = {f"b_{name}": max(getattr(said, name), before[f"b_{name}"] if same else 0) for name in COUNTS}
    slot = said.slot or (before["b_slot"] if same else "")
    return {"b_node": node, "b_generation": said.generation, "b_slot": slot, **counts}


def _with_unwritten(update: Update, pending: dict[str, Any]) -> Update:
    """With the bytes that are still to be written."""
    if pending["b_generation"] != update.generation:
        return update
    most = {name: max(pending[f"b_{name}"], getattr(update, name)) for name in COUNTS}
    return replace(update, slot=pending["b_slot"] or update.slot, **most)
