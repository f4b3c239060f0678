"""Recoveries that operators have asked for, and that have not ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sqlalchemy import delete, insert, select

from instar_server.storage.connection import Connection
from instar_server.storage.schema import recoveries


@dataclass(frozen=True, slots=True)
class Asked:
    """`digest` is the program digest of the release `version`; `asked` is unix time."""

    id: str
    node: str
    version: str
    digest: str
    lines: tuple[str, ...]
    asked: float


class AskedRecoveries:
    def __init__(self, connection: Connection) -> None:
        self._c = connection

    async def add(self, row: Asked) -> None:
        values = asdict(row) | {"lines": ",".join(row.lines)}
        await self._c.execute(insert(recoveries).values(values))

    async def remove(self, id_: str) -> None:
        await self._c.execute(delete(recoveries).where(recoveries.c.id == id_))

    async def all(self) -> list[Asked]:
        """The last word about a node comes last."""
        rows = await self._c.execute(select(recoveries).order_by(recoveries.c.asked))
        return [Asked(r.id, r.node, r.version, r.digest, tuple(r.lines.split(",")), r.asked) for r in rows]
