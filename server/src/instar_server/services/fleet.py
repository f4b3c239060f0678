"""The fleet as operators see it: what is stored, and what is live."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from instar_server.domain.errors import NotFound
from instar_server.services.presence import Presence
from instar_server.storage.batch import Observations
from instar_server.storage.database import Database
from instar_server.storage.nodes import Certificates, Groups, Nodes
from instar_server.storage.rows import CertificateRow, NodeRow


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node with its live state. Absent values are None or ''."""

    row: NodeRow
    state: str  # connected | beacon | offline | never-seen | revoked
    connected_since: float | None
    last_seen: float | None
    agent: tuple[str, str]  # version, program digest
    updater: tuple[str, str]
    health: dict[str, Any]
    facts: dict[str, Any]
    columns: dict[str, Any]  # of the node's row, with what was seen since it was written


class Fleet:
    def __init__(self, database: Database, presence: Presence, observations: Observations) -> None:
        self._database, self._presence, self._observations = database, presence, observations

    async def nodes(
        self, group: str | None, after: str, limit: int, only: list[str] | None = None
    ) -> list[NodeView]:
        async with self._database.read() as connection:
            rows = await Nodes(connection).page(group, after, limit, only)
        return [self._view(row) for row in rows]

    async def node(self, node: str) -> NodeView:
        async with self._database.read() as connection:
            row = await Nodes(connection).get(node)
        if row is None:
            raise NotFound("unknown-node", f"cannot show {node[:40]}: there is no such node")
        return self._view(row)

    async def certificates(self, node: str) -> list[CertificateRow]:
        async with self._database.read() as connection:
            return await Certificates(connection).of_node(node)

    async def groups(self) -> list[tuple[str, int]]:
        async with self._database.read() as connection:
            return await Groups(connection).all()

    async def add_group(self, name: str, now: float) -> bool:
        async with self._database.write() as connection:
            return await Groups(connection).ensure(name, now)

    def _view(self, row: NodeRow) -> NodeView:
        live = self._presence.get(row.id)
        columns = row.columns | self._observations.latest(row.id)
        health = json.loads(columns["health"])
        if columns["health_ok"] is not None:
            health = {"ok": bool(columns["health_ok"]), "at": columns["health_at"], **health}
        if row.revoked_at is not None:
            state = "revoked"
        elif live is not None:
            state = "connected"
        elif self._presence.beacon(row.id) is not None:
            state = "beacon"
        else:
            state = "never-seen" if columns["last_seen"] is None else "offline"
        agent = (live.version, live.digest) if live else (columns["agent_version"], columns["agent_digest"])
        return NodeView(
            row,
            state,
            live.since if live else None,
            live.heard if live else columns["last_seen"],
            agent,
            (columns["updater_version"], columns["updater_digest"]),
            health,
            json.loads(columns["facts"]),
            columns,
        )
