"""Enrolment tokens and the operators' API tokens; only hashes are kept."""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.sqlite import insert

from instar_server.domain.tokens import EnrolmentToken
from instar_server.storage.connection import Connection
from instar_server.storage.rows import ApiTokenRow, TokenRow
from instar_server.storage.schema import api_tokens, enrolment_tokens


class EnrolmentTokens:
    def __init__(self, connection: Connection) -> None:
        self._c = connection

    async def add(self, row: TokenRow, hash_: str, made_by: str) -> None:
        values: dict[str, Any] = {
            "id": row.id,
            "group_name": row.group,
            "uses": row.uses,
            "uses_left": row.uses_left,
        }
        values |= {"expires": row.expires, "created": row.created, "label": row.label}
        await self._c.execute(insert(enrolment_tokens).values(**values, hash=hash_, created_by=made_by))

    async def find(self, hash_: str) -> EnrolmentToken | None:
        t = enrolment_tokens.c
        found = select(t.id, t.group_name, t.uses_left, t.expires).where(t.hash == hash_)
        row = (await self._c.execute(found)).first()
        return EnrolmentToken(row.id, row.group_name, row.uses_left, row.expires) if row is not None else None

    async def use(self, id_: str) -> bool:
        """Take one use. False: none was left, or there is no such token."""
        t = enrolment_tokens.c
        one = update(enrolment_tokens).where(t.id == id_, t.uses_left > 0).values(uses_left=t.uses_left - 1)
        return await self._c.change(one) > 0

    async def all(self) -> list[TokenRow]:
        rows = await self._c.execute(select(enrolment_tokens).order_by(enrolment_tokens.c.created))
        return [
            TokenRow(r.id, r.group_name, r.uses, r.uses_left, r.expires, r.created, r.label) for r in rows
        ]

    async def remove(self, id_: str) -> bool:
        return await self._c.change(delete(enrolment_tokens).where(enrolment_tokens.c.id == id_)) > 0


class ApiTokens:
    def __init__(self, connection: Connection) -> None:
        self._c = connection

    async def add(self, row: ApiTokenRow, hash_: str) -> None:
        values = {"id": row.id, "role": row.role, "created": row.created, "label": row.label}
        await self._c.execute(insert(api_tokens).values(**values, hash=hash_))

    async def find(self, hash_: str) -> ApiTokenRow | None:
        row = (await self._c.execute(select(api_tokens).where(api_tokens.c.hash == hash_))).first()
        return ApiTokenRow(row.id, row.role, row.created, row.label) if row is not None else None

    async def all(self) -> list[ApiTokenRow]:
        rows = await self._c.execute(select(api_tokens).order_by(api_tokens.c.created))
        return [ApiTokenRow(r.id, r.role, r.created, r.label) for r in rows]

    async def remove(self, id_: str) -> bool:
        return await self._c.change(delete(api_tokens).where(api_tokens.c.id == id_)) > 0

    async def count(self, role: str) -> int:
        counted = select(func.count()).select_from(api_tokens).where(api_tokens.c.role == role)
        return int((await self._c.execute(counted)).scalar_one())
