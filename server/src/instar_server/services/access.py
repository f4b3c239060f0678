"""Who may use the operators' API: bearer tokens with a role each."""

from __future__ import annotations

from instar_server.domain.errors import Conflict, Forbidden, NotFound, Unauthenticated
from instar_server.domain.tokens import MAX_TOKEN, ROLES, allows, secret_hash
from instar_server.services.ports import Chance, Now
from instar_server.storage.database import Database
from instar_server.storage.rows import ApiTokenRow
from instar_server.storage.tokens import ApiTokens

LATELY_S = 2.0
MOST_LATELY = 1000


class Access:
    def __init__(self, database: Database, now: Now, chance: Chance) -> None:
        self._database, self._now, self._chance = database, now, chance
        self._lately: dict[str, tuple[float, ApiTokenRow]] = {}
        self._removals = 0

    async def check(self, secret: str | None, needed: str) -> ApiTokenRow:
        """The caller behind a bearer token. Raises Unauthenticated, Forbidden `role-too-low`."""
        if not secret:
            raise Unauthenticated(
                "no-token", "cannot serve: expected the header 'Authorization: Bearer <token>'"
            )
        row = None
        if len(secret) <= MAX_TOKEN:
            row = await self._find(secret_hash(secret))
        if row is None:
            raise Unauthenticated("bad-token", "cannot serve: the API token is not known here")
        if not allows(row.role, needed):
            raise Forbidden("role-too-low", f"cannot do this as {row.role}: expected {needed}")
        return row

    async def _find(self, hash_: str) -> ApiTokenRow | None:
        """The token, as it was at most LATELY_S ago; one that is removed here is gone at once."""
        now = self._now()
        at, known = self._lately.get(hash_, (0.0, None))
        if known is not None and 0 <= now - at < LATELY_S:
            return known
        removals = self._removals
        row = await self._database.read_at_once(lambda c: ApiTokens(c).find(hash_))
        if row is not None and removals == self._removals:
            if len(self._lately) >= MOST_LATELY:
                self._lately.clear()
            self._lately[hash_] = (now, row)
        return row

    async def make(self, role: str, label: str) -> tuple[ApiTokenRow, str]:
        """A new API token and its secret, which is shown once."""
        if role not in ROLES:
            raise ValueError(f"cannot make an API token: expected a role of {ROLES}, got {role}")
        secret = self._chance(32)
        row = ApiTokenRow(self._chance(6), role, self._now(), label)
        async with self._database.write() as connection:
            await ApiTokens(connection).add(row, secret_hash(secret))
        return row, secret

    async def all(self) -> list[ApiTokenRow]:
        async with self._database.read() as connection:
            return await ApiTokens(connection).all()

    async def remove(self, id_: str) -> None:
        """Raises NotFound, and Conflict `last-admin` rather than lock everybody out."""
        async with self._database.write() as connection:
            tokens = ApiTokens(connection)
            row = next((each for each in await tokens.all() if each.id == id_), None)
            if row is None:
                raise NotFound(
                    "unknown-token", f"cannot delete API token {id_[:40]}: there is none with this id"
                )
            if row.role == "admin" and await tokens.count("admin") == 1:
                raise Conflict("last-admin", f"cannot delete API token {id_}: it is the last admin's")
            await tokens.remove(id_)
        self._removals += 1
        self._lately.clear()
