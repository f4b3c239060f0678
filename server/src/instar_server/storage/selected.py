"""Which nodes a selector names now."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from sqlalchemy import bindparam, select

from instar_server.domain.selectors import COLUMNS, Selector, narrow
from instar_server.storage.connection import Connection, Prepared
from instar_server.storage.schema import groups, nodes

_COLUMN_OF = {"os": "os", "arch": "arch", "version": "agent_version", "python": "python"}
_NODE = Prepared(select(nodes.c.id, nodes.c.revoked_at).where(nodes.c.id == bindparam("b_id")))


class Selected:
    """Who an order is for."""

    def __init__(self, connection: Connection) -> None:
        self._c = connection

    async def group_exists(self, name: str) -> bool:
        return (await self._c.execute(select(groups.c.name).where(groups.c.name == name))).first() is not None

    async def named(self, ids: Iterable[str]) -> dict[str, bool]:
        """Those of these nodes that there are; True: revoked."""
        found = {}
        for id_ in ids:
            for row in await self._c.run(_NODE, {"b_id": id_}):
                found[id_] = row["revoked_at"] is not None
        return found

    async def nodes(self, selector: Selector) -> list[str]:
        """Its nodes that are not revoked, by id."""
        if selector.nodes and not selector.where:
            return sorted(node for node, revoked in (await self.named(selector.nodes)).items() if not revoked)
        columns = [nodes.c.id] if not selector.where else [nodes.c.id, nodes.c.facts, *_hello_columns()]
        wanted = select(*columns).where(nodes.c.revoked_at.is_(None)).order_by(nodes.c.id)
        if selector.group:
            wanted = wanted.where(nodes.c.group_name == selector.group)
        rows = await self._c.execute(wanted)
        if not selector.where:
            return [row.id for row in rows]
        named = frozenset(selector.nodes)
        return [row.id for row in rows if (not named or row.id in named) and _is_meant(row, selector)]


def _hello_columns() -> list[Any]:
    return [nodes.c[_COLUMN_OF[name]].label(f"h_{name}") for name in COLUMNS]


def _is_meant(row: Any, selector: Selector) -> bool:
    columns = {name: getattr(row, f"h_{name}") for name in COLUMNS}
    return narrow(json.loads(row.facts), columns, selector.where)
