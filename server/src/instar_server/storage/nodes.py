"""Nodes, their groups and certificates."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.dialects.sqlite import insert

from instar_server.storage.connection import Connection
from instar_server.storage.rows import CertificateRow, NodeRow
from instar_server.storage.schema import certificates, groups, nodes


class Groups:
    def __init__(self, connection: Connection) -> None:
        self._c = connection

    async def ensure(self, name: str, now: float) -> bool:
        """Make the group unless it is there. True: it is new."""
        return (
            await self._c.change(insert(groups).values(name=name, created=now).on_conflict_do_nothing()) > 0
        )

    async def exists(self, name: str) -> bool:
        return (await self._c.execute(select(groups.c.name).where(groups.c.name == name))).first() is not None

    async def all(self) -> list[tuple[str, int]]:
        """(name, number of nodes that are not revoked), by name."""
        live = nodes.c.revoked_at.is_(None)
        counted = (
            select(groups.c.name, func.count(nodes.c.id))
            .select_from(groups.outerjoin(nodes, (nodes.c.group_name == groups.c.name) & live))
            .group_by(groups.c.name)
            .order_by(groups.c.name)
        )
        return [(name, count) for name, count in await self._c.execute(counted)]


class Nodes:
    def __init__(self, connection: Connection) -> None:
        self._c = connection

    async def add(
        self, node: str, group: str, now: float, enrol_key: str, token: str, facts: dict[str, Any]
    ) -> None:
        values = {"id": node, "group_name": group, "enrolled": now, "enrol_key": enrol_key, "token": token}
        await self._c.execute(insert(nodes).values(**values, facts=json.dumps(facts)))

    async def get(self, node: str) -> NodeRow | None:
        row = (await self._c.execute(select(nodes).where(nodes.c.id == node))).mappings().first()
        return _node(row) if row is not None else None

    async def by_enrolment(self, token: str, enrol_key: str) -> NodeRow | None:
        """The node that this key enrolled with this token."""
        match = select(nodes).where(nodes.c.token == token, nodes.c.enrol_key == enrol_key)
        row = (await self._c.execute(match)).mappings().first()
        return _node(row) if row is not None else None

    async def page(
        self, group: str | None, after: str, limit: int, only: list[str] | None = None
    ) -> list[NodeRow]:
        """Nodes by id, those after `after`; of one group, or only those named, where asked for."""
        wanted = select(nodes).where(nodes.c.id > after).order_by(nodes.c.id).limit(limit)
        if group is not None:
            wanted = wanted.where(nodes.c.group_name == group)
        if only is not None:
            wanted = wanted.where(nodes.c.id.in_(only))
        return [_node(row) for row in (await self._c.execute(wanted)).mappings()]

    async def set(self, node: str, **columns: Any) -> bool:
        """Change columns of a node. False: there is no such node."""
        return await self._c.change(update(nodes).where(nodes.c.id == node).values(**columns)) > 0

    async def lapse(self, phases: list[str], before: float, code: str, text: str) -> int:
        """Close transactions that were last heard of before `before` in one of `phases`. How many."""
        stale = update(nodes).where(nodes.c.tx_phase.in_(phases), nodes.c.tx_at < before)
        return await self._c.change(stale.values(tx_phase="lapsed", tx_reason_code=code, tx_reason_text=text))


class Certificates:
    def __init__(self, connection: Connection) -> None:
        self._c = connection

    async def add(self, serial: str, node: str, now: float, not_after: float) -> None:
        values = {"serial": serial, "node": node, "issued": now, "not_after": not_after}
        await self._c.execute(insert(certificates).values(**values))

    async def get(self, serial: str) -> CertificateRow | None:
        row = (await self._c.execute(_with_node().where(certificates.c.serial == serial))).first()
        return _certificate(row) if row is not None else None

    async def of_node(self, node: str) -> list[CertificateRow]:
        mine = _with_node().where(certificates.c.node == node).order_by(certificates.c.issued)
        return [_certificate(row) for row in await self._c.execute(mine)]

    async def good(self, now: float, limit: int) -> list[CertificateRow]:
        """Certificates in use, to know them before their nodes connect."""
        good = (
            _with_node()
            .where(certificates.c.not_after > now, certificates.c.revoked_at.is_(None))
            .limit(limit)
        )
        return [_certificate(row) for row in await self._c.execute(good)]

    async def revoke(self, serial: str, now: float) -> bool:
        """False: there is no such certificate, or it was revoked before."""
        open_ = (certificates.c.serial == serial) & certificates.c.revoked_at.is_(None)
        return await self._c.change(update(certificates).where(open_).values(revoked_at=now)) > 0


def _with_node() -> Any:
    columns = (*certificates.c, nodes.c.revoked_at.label("node_revoked_at"))
    return select(*columns).join(nodes, nodes.c.id == certificates.c.node)


def _certificate(row: Any) -> CertificateRow:
    return CertificateRow(
        row.serial, row.node, row.issued, row.not_after, row.revoked_at, row.node_revoked_at is not None
    )


def _node(row: Any) -> NodeRow:
    return NodeRow(
        row["id"], row["group_name"], row["enrolled"], row["revoked_at"], row["revoked_why"],
        row["generation_floor"], row["chain_n"], row["chain_hash"], dict(row),
    )  # fmt: skip
