"""Whose certificate may still be used: asked at every connection and every request of a node.

Answers are kept in memory, so the check costs a dictionary look-up; a revocation empties them first
and is then told to whoever holds the node's channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from instar_server.bus.api import AGENTS, FLEET, Bus
from instar_server.domain.errors import Conflict, Forbidden, NotFound
from instar_server.services.history import History, server_entry
from instar_server.services.ports import Now
from instar_server.storage.database import Database
from instar_server.storage.events import Events
from instar_server.storage.nodes import Certificates, Nodes
from instar_server.storage.orders import Orders
from instar_server.storage.rows import CertificateRow

MOST_KNOWN = 200_000  # certificates kept in memory


class Lapsed(Enum):
    """Whether something is done for a node whose certificate has run out. It is a known one still, and not revoked:
    by it the node may get the next one, or be brought back to where it can ask for that."""

    REFUSED = "refused"
    WHILE_RECOVERED = "while recovered"  # as long as a recovery of the node is open
    SERVED = "served"


@dataclass(frozen=True, slots=True)
class Peer:
    """A node whose certificate is good for what it asks. `not_after`: when it ends, or did; unix time."""

    node: str
    serial: str
    not_after: float


class Standing:
    """`recovered` says of which nodes a recovery is open."""

    def __init__(self, database: Database, bus: Bus, now: Now) -> None:
        self._database, self._bus, self._now = database, bus, now
        self._good: dict[str, Peer] = {}
        self._revocations = 0
        self.recovered: Callable[[str], bool] = lambda _node: False

    async def warm(self) -> None:
        """Learn the certificates in use, so that a whole fleet may come back at once."""
        async with self._database.read() as connection:
            for row in await Certificates(connection).good(self._now(), MOST_KNOWN):
                if not row.node_revoked:
                    self._good[row.serial] = Peer(row.node, row.serial, row.not_after)

    async def check(self, serial: str, node: str, lapsed: Lapsed = Lapsed.REFUSED) -> Peer:
        """The peer, if its certificate is one of ours, of that node, not revoked, and in time or `lapsed` allows it.

        Raises Forbidden `revoked`, `certificate-unknown`, `certificate-expired`.
        """
        peer = self._good.get(serial)
        if peer is None:
            peer = await self._look_up(serial)
        if peer.node != node:
            raise Forbidden(
                "certificate-unknown", f"cannot serve {node}: the certificate {serial} is another node's"
            )
        if peer.not_after <= self._now() and not self._serves_lapsed(node, lapsed):
            raise Forbidden(
                "certificate-expired",
                f"cannot serve {node}: the certificate {serial} has expired; get the next one by POST /v1/renew",
            )
        return peer

    def _serves_lapsed(self, node: str, lapsed: Lapsed) -> bool:
        return lapsed is Lapsed.SERVED or (lapsed is Lapsed.WHILE_RECOVERED and self.recovered(node))

    async def _look_up(self, serial: str) -> Peer:
        row, counted = None, -1
        while counted != self._revocations:  # a revocation meanwhile: what was read may be too old
            counted = self._revocations
            async with self._database.read() as connection:
                row = await Certificates(connection).get(serial)
        if row is None:
            raise Forbidden(
                "certificate-unknown", f"cannot serve: the certificate {serial} is not known here"
            )
        if row.revoked_at is not None or row.node_revoked:
            raise Forbidden("revoked", f"cannot serve {row.node}: it was revoked")
        return self.learn(row)

    def learn(self, row: CertificateRow) -> Peer:
        if len(self._good) >= MOST_KNOWN:
            self._good.clear()
        peer = self._good[row.serial] = Peer(row.node, row.serial, row.not_after)
        return peer

    async def revoke_node(self, node: str, why: str, by: str) -> None:
        """Never serve this node again. Raises NotFound, Conflict `already-revoked`."""
        now = self._now()
        async with self._database.write() as connection:
            row = await Nodes(connection).get(node)
            if row is None:
                raise NotFound("unknown-node", f"cannot revoke {node}: there is no such node")
            if row.revoked_at is not None:
                raise Conflict("already-revoked", f"cannot revoke {node}: it is revoked already")
            await Nodes(connection).set(node, revoked_at=now, revoked_why=why)
            await Orders(connection).make_due(node, now)  # they end as lost
            entry = server_entry(
                f"revoked:{row.chain_n + 1}", "revoked", now, "revoked", f"revoked by {by}: {why}"
            )
            await Events(connection).append(node, History.SERVER, [entry], now)
        self._forget(node, None)

    async def revoke_certificate(self, serial: str, by: str) -> None:
        """Never accept this certificate again; the node's others stay good. Raises NotFound, Conflict."""
        now = self._now()
        async with self._database.write() as connection:
            row = await Certificates(connection).get(serial)
            if row is None:
                raise NotFound("unknown-certificate", f"cannot revoke {serial}: there is no such certificate")
            if not await Certificates(connection).revoke(serial, now):
                raise Conflict("already-revoked", f"cannot revoke {serial}: it is revoked already")
            entry = server_entry(
                f"certificate-revoked:{serial}",
                "certificate-revoked",
                now,
                "revoked",
                f"{serial} revoked by {by}",
            )
            await Events(connection).append(row.node, History.SERVER, [entry], now)
        self._forget(row.node, serial)

    def _forget(self, node: str, serial: str | None) -> None:
        self._revocations += 1
        gone = [s for s, peer in self._good.items() if peer.node == node and serial in (None, s)]
        for each in gone:
            del self._good[each]
        self._bus.publish(AGENTS, {"do": "revoke", "node": node, "serial": serial})
        self._bus.publish(FLEET, {"kind": "revoked", "node": node, "serial": serial or ""})
