"""How a machine becomes a node, and how a node gets its next certificate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from instar.core.errors import InputError
from instar_server.bus.api import FLEET, Bus
from instar_server.ca import FleetCA, NodeKey, check_csr, key_hash
from instar_server.domain.errors import Forbidden, NotFound, TooMany
from instar_server.domain.guesses import Guesses, source_of
from instar_server.domain.names import group_name
from instar_server.domain.tokens import EnrolmentToken, check_usable, secret_hash
from instar_server.services.history import History, server_entry
from instar_server.services.ports import Chance, Now
from instar_server.storage.connection import Connection
from instar_server.storage.database import Database
from instar_server.storage.events import Events
from instar_server.storage.nodes import Certificates, Groups, Nodes
from instar_server.storage.rows import TokenRow
from instar_server.storage.tokens import EnrolmentTokens

MAX_FACTS = 16_384  # bytes of JSON
MAX_USES = 1_000_000
MAX_LIFETIME_S = 10 * 365 * 86400.0


@dataclass(frozen=True, slots=True)
class Enrolled:
    node: str
    certificate: str  # PEM
    ca: str  # PEM
    group: str


class Enrolment:
    """`lifetime_s` of node certificates; `wrong_tokens` that one address may send in a minute."""

    def __init__(
        self,
        database: Database,
        bus: Bus,
        ca: FleetCA,
        lifetime_s: float,
        now: Now,
        chance: Chance,
        wrong_tokens: int,
    ) -> None:
        self._guesses = Guesses(wrong_tokens)
        self._database, self._bus, self._ca, self._lifetime_s = database, bus, ca, lifetime_s
        self._now, self._chance = now, chance

    async def enrol(self, token: str, csr: str, facts: dict[str, Any], address: str | None) -> Enrolled:
        """Use the token once and make a node. The same key and token again, when the answer got lost,
        give the same node and use nothing.

        Raises Forbidden `token-unknown`, `token-used-up`, `token-expired`, `revoked`; InputError `bad-csr`;
        TooMany `too-many-guesses` for an address that has sent too many wrong tokens.
        """
        with self._guessing(address):
            return await self._enrol(token, csr, facts)

    async def _enrol(self, token: str, csr: str, facts: dict[str, Any]) -> Enrolled:
        key = check_csr(csr)
        if len(json.dumps(facts)) > MAX_FACTS:
            raise InputError("bad-facts", f"cannot enrol: expected facts of at most {MAX_FACTS} bytes")
        now = self._now()
        async with self._database.write() as connection:
            found = await EnrolmentTokens(connection).find(secret_hash(token))
            node = await self._node_for(connection, found, key, now, facts)
            group = found.group if found else ""
            certificate = await self._issue(connection, node, key, now)
        self._bus.publish(FLEET, {"kind": "enrolled", "node": node, "group": group})
        return Enrolled(node, certificate, self._ca.pem, group)

    async def _node_for(
        self,
        connection: Connection,
        token: EnrolmentToken | None,
        key: NodeKey,
        now: float,
        facts: dict[str, Any],
    ) -> str:
        """The node that this token and key made before, or a new one."""
        if token is not None and token.expires > now:
            before = await Nodes(connection).by_enrolment(token.id, key_hash(key))
            if before is not None:
                if before.revoked_at is not None:
                    raise Forbidden("revoked", f"cannot enrol {before.id}: it was revoked")
                return before.id
        good = check_usable(token, now)
        if not await EnrolmentTokens(connection).use(good.id):
            raise Forbidden("token-used-up", f"cannot enrol: the token {good.id} has no use left")
        node = f"n-{self._chance(8)}"
        await Nodes(connection).add(node, good.group, now, key_hash(key), good.id, facts)
        text = f"enrolled into group {good.group} with token {good.id}"
        await Events(connection).append(
            node, History.SERVER, [server_entry("enrolled:1", "enrolled", now, "enrolled", text)], now
        )
        return node

    async def renew(self, node: str, csr: str) -> str:
        """The next certificate (PEM) of a node that has shown a good one. The old one stays good."""
        key = check_csr(csr)
        async with self._database.write() as connection:
            row = await Nodes(connection).get(node)
            if row is None or row.revoked_at is not None:
                raise Forbidden("revoked", f"cannot renew for {node}: it was revoked")
            return await self._issue(connection, node, key, self._now())

    async def _issue(self, connection: Connection, node: str, key: NodeKey, now: float) -> str:
        issued = self._ca.issue_node(node, key, now, self._lifetime_s)
        await Certificates(connection).add(issued.serial, node, now, issued.not_after)
        return issued.pem

    # ---- tokens

    async def make_token(
        self, group: str, uses: int, lifetime_s: float, label: str, by: str
    ) -> tuple[TokenRow, str, bool]:
        """A new token, its secret, which is shown once, and whether its group was made for it."""
        group_name(group)
        if not 1 <= uses <= MAX_USES or not 1 <= lifetime_s <= MAX_LIFETIME_S:
            raise InputError("bad-token", f"cannot make a token for {uses} uses and {lifetime_s:g} s")
        now, secret = self._now(), self._chance(32)
        row = TokenRow(self._chance(6), group, uses, uses, now + lifetime_s, now, label)
        async with self._database.write() as connection:
            group_made = await Groups(connection).ensure(group, now)
            await EnrolmentTokens(connection).add(row, secret_hash(secret), by)
        return row, secret, group_made

    async def tokens(self) -> list[TokenRow]:
        async with self._database.read() as connection:
            return await EnrolmentTokens(connection).all()

    async def remove_token(self, id_: str) -> None:
        async with self._database.write() as connection:
            if not await EnrolmentTokens(connection).remove(id_):
                raise NotFound("unknown-token", f"cannot delete token {id_[:40]}: there is none with this id")

    async def check_token(self, secret: str, address: str | None) -> EnrolmentToken:
        """The token, if it may enrol a node now; nothing is used. Raises Forbidden, TooMany."""
        with self._guessing(address):
            async with self._database.read() as connection:
                return check_usable(await EnrolmentTokens(connection).find(secret_hash(secret)), self._now())

    @contextmanager
    def _guessing(self, address: str | None) -> Iterator[None]:
        """Keep out who has sent too many tokens that are not good; count one more if this one is not."""
        source = source_of(address)
        wait_s = self._guesses.wait_s(source, self._now())
        if wait_s > 0:
            text = f"cannot try another token: too many were wrong; come back in {wait_s:.0f} s"
            raise TooMany("too-many-guesses", text, wait_s)
        try:
            yield
        except Forbidden:
            self._guesses.wrong(source, self._now())
            raise
