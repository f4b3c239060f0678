"""The periodic work: nudges, what is sent, lapses, renewals. What is due is decided in `domain`; this does it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from sqlalchemy.exc import SQLAlchemyError

from instar.core.errors import InstarError
from instar_server.bus.api import AGENTS, FLEET, WISHES, Bus, Message
from instar_server.domain import looks
from instar_server.domain.looks import LookRules, Observed, SendTo
from instar_server.domain.names import MODULE_LINE
from instar_server.services.ports import Now
from instar_server.services.presence import Live, Presence
from instar_server.storage import work
from instar_server.storage.database import Database
from instar_server.storage.nodes import Nodes
from instar_server.storage.orders import Orders
from instar_server.storage.rows import NodeRow

log = logging.getLogger(__name__)

LAPSE_AFTER_S = 7200.0  # longer than any step of a transaction may take
KEEP_S = 30 * 86400.0  # how long jobs and verdicts are kept
GATHER_S = 0.1  # nodes that connect within this time are looked up at once
PART = 500  # nodes looked up at once

Chore = Callable[[], Awaitable[None]]
Sender = Callable[[SendTo], None]


class Scheduler:
    """`run` until cancelled. `chores` are other things to do now and then: (every so many seconds, what).

    `senders` are told in every round what each connected node lacks and is to be sent, also when that is
    nothing; `in_trouble` says which node cannot reach the artifacts.
    """

    def __init__(
        self,
        database: Database,
        bus: Bus,
        presence: Presence,
        now: Now,
        rules: LookRules,
        senders: tuple[Sender, ...] = (),
        in_trouble: Callable[[str], bool] = lambda _node: False,
        every_s: float = 5.0,
        chores: tuple[tuple[float, Chore], ...] = (),
    ) -> None:
        self._database, self._bus, self._presence, self._now = database, bus, presence, now
        self._rules, self._every_s = rules, every_s
        self._senders, self._in_trouble = senders, in_trouble
        self._chores = ((600.0, self.lapse), *chores)
        self._joined: set[str] = set()
        self._all = False
        self._wake = asyncio.Event()

    def joined(self, node: str) -> None:
        """A node has connected: see, together with those that come right after it, whether it needs a look."""
        if not self._joined:
            asyncio.get_running_loop().call_later(GATHER_S, self._wake.set)
        self._joined.add(node)

    async def run(self) -> None:
        wishes = self._bus.subscribe(WISHES, lambda _message: self._everyone())
        fleet = self._bus.subscribe(FLEET, self._changed)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._looks())
                for every_s, chore in self._chores:
                    group.create_task(self._repeat(every_s, chore))
        finally:
            wishes.close()
            fleet.close()

    def _changed(self, message: Message) -> None:
        """A transaction has ended: what waited for that is due."""
        if message.body["kind"] == "event" and message.body["phase"] in looks.ENDED_PHASES:
            self.joined(message.body["node"])

    def _everyone(self) -> None:
        self._all = True
        self._wake.set()

    async def _looks(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._every_s):
                    await self._wake.wait()
            except TimeoutError:
                self._all = True
            self._wake.clear()
            everyone, self._all = self._all, False
            joined, self._joined = self._joined, set()
            try:
                await self.look_round(None if everyone else joined)
            except SQLAlchemyError as error:
                log.error("cannot see who needs a look: %s", error)

    async def look_round(self, only: set[str] | None) -> int:
        """Send the looks that are due now, to the nodes `only` or to all. How many."""
        lives = [live for live in self._presence.all() if only is None or live.node in only]
        async with self._database.read() as connection:
            wishes = await work.Wishes(connection).all()
        sent = 0
        if not wishes:  # then only nodes that run a module, and do not know yet, can need one
            self._send([SendTo(live.node, (), False) for live in lives])
            lives = [live for live in lives if _lines(live) - live.told_gone]
        for start in range(0, len(lives), PART):
            part = {live.node: live for live in lives[start : start + PART]}
            async with self._database.read() as connection:
                rows = await Nodes(connection).page(None, "", PART, sorted(part))
            observed = [self._observe(row, part[row.id]) for row in rows]
            now = self._now()
            for look in looks.decide(wishes, observed, now, self._rules):
                live = part[look.node]
                live.told_gone = look.gone
                if look.generation:
                    live.tries = live.tries + 1 if look.generation == live.told else 1
                    live.told, live.looked_at = look.generation, now
                self._bus.publish(AGENTS, {"do": "look", "node": look.node, "reason": look.reason})
                sent += 1
            self._send(looks.to_send(wishes, observed))
        return sent

    def _send(self, wanted: list[SendTo]) -> None:
        for sender in self._senders:
            for each in wanted:
                sender(each)

    def _observe(self, row: NodeRow, live: Live) -> Observed:
        updater = self._presence.updater(row.id) or row.columns["updater_digest"]
        running = {"agent": live.digest} | ({"updater": updater} if updater else {})
        running |= {
            f"{MODULE_LINE}{name}": digest for name, digest in live.digests.items()
        }  # its last health's
        return Observed(
            row.id, row.group, running, row.generation_floor, row.columns["tx_phase"],
            live.told, live.looked_at, live.tries, live.told_gone, self._in_trouble(row.id), live.forced,
        )  # fmt: skip

    async def lapse(self) -> None:
        """Close transactions that nobody tells of any more; forget old jobs and verdicts."""
        now = self._now()
        async with self._database.write() as connection:
            text = f"nothing was heard of it for {LAPSE_AFTER_S:g} s"
            await Nodes(connection).lapse(sorted(looks.OPEN_PHASES), now - LAPSE_AFTER_S, "no-report", text)
            await Orders(connection).forget(now - KEEP_S)
            await work.Jobs(connection).forget(now - KEEP_S)
            await work.Verdicts(connection).forget(now - KEEP_S)

    async def _repeat(self, every_s: float, chore: Chore) -> None:
        while True:
            try:
                await chore()
            except (InstarError, OSError, SQLAlchemyError) as error:
                log.error("cannot do %s: %s", getattr(chore, "__name__", chore), error)
            await asyncio.sleep(every_s)


def _lines(live: Live) -> set[str]:
    return {f"{MODULE_LINE}{name}" for name in live.digests}
