"""Updates of nodes' operating systems: one at a time of a node, ordered here, done by the node, told of by its events.

What is open is in the database, and only there: a restart of the server changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from instar.core.system import check_mode
from instar_server.bus.api import AGENTS, FLEET, Bus, system_topic
from instar_server.domain import looks, systems
from instar_server.domain.errors import Conflict, NotFound, Precondition
from instar_server.domain.systems import ColdBoot, Update
from instar_server.services import system_entries as entries
from instar_server.services.bundles import Bundles, SystemBundle
from instar_server.services.history import History
from instar_server.services.ports import Chance, Now
from instar_server.services.scheduler import LAPSE_AFTER_S
from instar_server.services.system_reports import SystemReport
from instar_server.services.system_said import Said, SystemsSaid
from instar_server.storage.batch import Observations
from instar_server.storage.connection import Connection
from instar_server.storage.database import Database
from instar_server.storage.events import Events
from instar_server.storage.nodes import Nodes
from instar_server.storage.rows import NodeRow
from instar_server.storage.systems import SystemUpdates
from instar_server.storage.work import Wishes

log = logging.getLogger(__name__)

SHOWN = 10  # updates
WRITE_EVERY_S = 1.0
OVER_EVERY_S = 5.0  # how often it is looked which orders have ended without anybody's word


@dataclass(frozen=True, slots=True)
class SystemView:
    """`report` is what the node said at `told` ({} and None: never); `updates` newest first; `cold_boot` is wanted,
    or was missed."""

    node: str
    report: dict[str, Any]
    told: float | None
    updates: list[Update]
    cold_boot: ColdBoot | None


class Systems:
    """`run` until cancelled, `close` at the end."""

    def __init__(
        self,
        database: Database,
        bus: Bus,
        bundles: Bundles,
        observations: Observations,
        now: Now,
        chance: Chance,
    ) -> None:
        self._database, self._bus, self._bundles = database, bus, bundles
        self._now, self._chance = now, chance
        self._said = SystemsSaid(database, bus, observations, now)
        self._looked = 0.0  # when it was last looked which orders are over
        self._waiting: set[str] = set()  # nodes to be told to look when they connect; a hint, no more

    async def warm(self) -> None:
        """Learn who is to be told to look."""
        self._waiting = await self._database.read_at_once(lambda c: SystemUpdates(c).waiting())

    # ---- orders

    async def order(self, node: str, bundle: object, activation: object, override: bool, by: str) -> Update:
        """Have a node put a published bundle into its other slot; `activation` none, reboot or kexec.

        Raises InputError `invalid-argument`, NotFound `not-found`, Conflict `aborted`, Precondition
        `failed-precondition`, MachineError `unavailable`. Nothing is written then.
        """
        mode, asked = check_mode(activation), systems.asked(bundle)
        found = self._bundles.find(asked.target)
        if found is None:
            raise NotFound("not-found", f"cannot update the system: {asked.target[:200]} is not published")
        least = await asyncio.to_thread(self._bundles.min_version, found)
        now = self._now()
        made = Update(
            f"os-{self._chance(6)}", node, 0, found.name, found.version, found.digest, found.target, asked.source,
            mode, override, now, by,
        )  # fmt: skip
        try:
            async with self._database.write() as connection:
                over = await self._end_over(connection, node)
                await self._check_order(connection, node, found, least)
                made = replace(made, generation=await Wishes(connection).next_generation(now))
                await SystemUpdates(connection).add(made)
                entry = entries.update_entry(made, "ordered", by, now)
                await Events(connection).append(node, History.SERVER, [entry], now)
        except IntegrityError:  # another process of this server was first
            raise systems.aborted(node, "another update is open") from None
        self._gone(over)
        self._changed(made, f"system {made.version} is wanted")
        return made

    async def _check_order(self, connection: Connection, node: str, bundle: SystemBundle, least: str) -> None:
        report, told = await self._check_free(connection, node)
        last = await SystemUpdates(connection).latest(node, 1)
        current = not last or (last[0].ended or 0.0) < (told or 0.0)
        systems.check_fits(report, bundle.target, bundle.compatible, bundle.arch, least, current)

    async def _check_free(self, connection: Connection, node: str) -> Said:
        """What the node last said of its system, and when, if it may be ordered something.

        Raises NotFound, Precondition for one that is revoked or has no slots, Conflict `aborted`.
        """
        row = await _existing(connection, node)
        said = self._said.newest(row)
        if row.revoked_at is not None:
            raise systems.unfit(f"revoked: {node} is no longer served")
        systems.check_slots(said.report)
        await self._check_idle(connection, row, said)
        return said

    async def _check_idle(self, connection: Connection, row: NodeRow, said: Said) -> None:
        """Raises Conflict `aborted` while an update is open, or the node is at a system transaction of any cause."""
        open_ = await SystemUpdates(connection).open_of(row.id)
        if open_ is not None:
            raise systems.aborted(
                row.id, f"{open_.id} to {open_.name} {open_.version} is {open_.phase or 'ordered'}"
            )
        if (under_way := said.report.get("update")) and self._counts(said.told):
            tx = under_way["tx"]
            if not await Events(connection).has_ended(row.id, tx, systems.FINAL):
                raise _at_work(row.id, tx, under_way["step"] or "begun", said.told)
        columns = row.columns
        at_work = columns["tx_line"] == systems.LINE and columns["tx_phase"] in looks.OPEN_PHASES
        if at_work and self._counts(columns["tx_at"]):
            raise _at_work(row.id, columns["tx"], columns["tx_phase"], columns["tx_at"])

    def _counts(self, said: float | None) -> bool:
        """Whether a node's word of that time still says what it is at. Its journals may be lost, or itself: what is
        never taken back must not stand for ever."""
        return said is not None and self._now() - said < LAPSE_AFTER_S

    async def cancel(self, node: str, by: str) -> Update:
        """Take the open update back, before the node has switched, or when nothing was heard of it for long.

        Raises NotFound `not-found`, Precondition `failed-precondition`.
        """
        now = self._now()
        async with self._database.write() as connection:
            row = await _existing(connection, node)
            open_ = self._as_of(row, await SystemUpdates(connection).open_of(node))
            if open_ is None:
                raise NotFound("not-found", f"cannot cancel: no system update of {node} is open")
            report, _ = self._said.newest(row)
            if systems.too_late(open_, report):
                said = await self._last_word(connection, row, open_.tx, open_.generation)
                if self._counts(said):
                    why = f"the node is past the switch ({open_.phase or 'activate'})"
                    raise _begun(f"cannot cancel {open_.id}: {why}", said)
            gone = replace(open_, state=systems.CANCELLED, ended=now)
            await SystemUpdates(connection).put(gone)
            entry = entries.update_entry(gone, "cancelled", by, now)
            await Events(connection).append(node, History.SERVER, [entry], now)
        self._gone([gone])
        return gone

    async def _last_word(
        self, connection: Connection, row: NodeRow, tx: str, generation: int
    ) -> float | None:
        """When the node last said something of a transaction, or of an order."""
        report, told = self._said.newest(row)
        said = await Events(connection).last_stored(row.id, tx) if tx else None
        if (report.get("update") or {}).get("generation") == generation:
            said = max(said or 0.0, told or 0.0)
        return said

    def _as_of(self, row: NodeRow, open_: Update | None) -> Update | None:
        """An order that is open still."""
        now = open_ and systems.as_of(open_, self._said.newest(row).report, row.revoked_at, self._now())
        return open_ if now and now.state == systems.OPEN else None

    async def _end_over(self, connection: Connection, node: str = "") -> list[Update]:
        """End what has ended without anybody's word. What that was, to be told when it is written."""
        now = self._now()
        over = await SystemUpdates(connection).over(now, node)
        for each in over:
            await SystemUpdates(connection).put(each)
            entry = entries.update_entry(each, each.code, "the server", now)
            await Events(connection).append(each.node, History.SERVER, [entry], now)
        return over

    # ---- cold boots

    async def cold_boot(self, node: str, at: float | None, by: str) -> ColdBoot:
        """Have the node prove at `at` (unix time; None: now) that the firmware starts the system that runs, in the
        place of one that was ordered before.

        Raises InputError `invalid-argument`, NotFound `not-found`, Conflict `aborted`, Precondition
        `failed-precondition`.
        """
        now = self._now()
        when = systems.check_time(at, now)
        async with self._database.write() as connection:
            over = await self._end_over(connection, node)
            await self._check_free(connection, node)
            generation = await Wishes(connection).next_generation(now)
            await Nodes(connection).set(node, cold_boot_at=when, cold_boot_generation=generation)
            entry = entries.cold_entry("ordered", generation, by, now)
            await Events(connection).append(node, History.SERVER, [entry], now)
        self._gone(over)
        self._tell(node, "a cold boot is wanted")
        return ColdBoot(when, generation)

    async def cancel_cold_boot(self, node: str, by: str) -> None:
        """Raises NotFound `not-found`, Precondition `failed-precondition` when the node has begun with it, unless
        nothing was heard of it for long."""
        now = self._now()
        async with self._database.write() as connection:
            row = await _existing(connection, node)
            wanted = await SystemUpdates(connection).cold_boot(node)
            if wanted is None:
                raise NotFound("not-found", f"cannot cancel: no cold boot of {node} is wanted")
            said = await self._said_of(connection, row, wanted)
            if self._counts(said):
                step = (self._said.newest(row).report.get("update") or {}).get("step") or "begun"
                raise _begun(f"cannot cancel the cold boot of {node}: it is under way ({step})", said)
            await Nodes(connection).set(node, cold_boot_at=None)
            entry = entries.cold_entry("cancelled", wanted.generation, by, now)
            await Events(connection).append(node, History.SERVER, [entry], now)
        self._tell(node, "a cold boot is wanted no more")

    async def _said_of(self, connection: Connection, row: NodeRow, wanted: ColdBoot) -> float | None:
        """When the node, which is at a cold boot, last said something of it; None: it is not."""
        under_way = self._said.newest(row).report.get("update") or {}
        if under_way.get("generation") != wanted.generation:
            return None
        return await self._last_word(connection, row, under_way["tx"], wanted.generation)

    async def _cold_boot_of(self, row: NodeRow, wanted: ColdBoot | None) -> ColdBoot | None:
        """As it is now: one that is late, and that the node has not begun with, is missed."""
        if wanted is None or row.revoked_at is not None or not systems.is_late(wanted, self._now()):
            return wanted if row.revoked_at is None else None
        async with self._database.read() as connection:
            return wanted._replace(missed=not self._counts(await self._said_of(connection, row, wanted)))

    # ---- what nodes ask and say

    async def wanted(self, node: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The line `os`, and the cold boot, as a node is told them."""

        async def read(connection: Connection) -> tuple[Update | None, ColdBoot | None]:
            updates = SystemUpdates(connection)
            return await updates.open_of(node), await updates.cold_boot(node)

        now = self._now()
        update, cold_boot = await self._database.read_at_once(read)
        late = cold_boot is not None and systems.is_late(cold_boot, now)
        if late or (update is not None and now >= update.made + systems.LAPSE_S):  # few are
            row = await self._database.read_at_once(lambda c: _existing(c, node))
            update, cold_boot = self._as_of(row, update), await self._cold_boot_of(row, cold_boot)
        if cold_boot is not None and cold_boot.missed:
            cold_boot = None
        if update is None and cold_boot is None:
            self._waiting.discard(node)
        line = systems.as_wire(update) if update is not None else None
        return line, {"at": cold_boot.at, "generation": cold_boot.generation} if cold_boot else None

    def joined(self, node: str) -> None:
        """A node has connected: if something is wanted of it, it should ask."""
        if node in self._waiting:
            self._look(node, "its system is to be updated")

    def report(self, node: str, said: SystemReport) -> None:
        """Keep what a node said of its slots. Raises InputError `report-too-large`."""
        self._said.keep(node, said)

    # ---- looking

    async def view(self, node: str) -> SystemView:
        """Raises NotFound `not-found`."""

        async def read(connection: Connection) -> tuple[NodeRow, list[Update], ColdBoot | None]:
            updates, row = SystemUpdates(connection), await _existing(connection, node)
            return row, await updates.latest(node, SHOWN), await updates.cold_boot(node)

        unwritten = self._said.unwritten(node)
        row, updates, cold_boot = await self._database.read_at_once(read)
        updates = unwritten.onto(updates)
        report, told = self._said.newest(row, unwritten)
        updates = [systems.as_of(each, report, row.revoked_at, self._now()) for each in updates]
        under_way = report.get("update")
        if under_way and any(each.tx == under_way["tx"] and each.ended is not None for each in updates):
            report = report | {"update": None}  # said before its last event, and heard after it
        return SystemView(node, report, told, updates, await self._cold_boot_of(row, cold_boot))

    # ---- telling and writing

    def _changed(self, update: Update, why: str) -> None:
        body = {"kind": "system-update", "node": update.node, "id": update.id, "version": update.version}
        self._bus.publish(FLEET, body | {"mode": update.mode, "state": update.state})
        self._tell(update.node, why)

    def _gone(self, updates: list[Update]) -> None:
        for each in updates:
            self._changed(each, f"system {each.version} is wanted no more")

    def _tell(self, node: str, why: str) -> None:
        self._waiting.add(node)
        self._bus.publish(system_topic(node), {"node": node})
        self._look(node, why)

    def _look(self, node: str, why: str) -> None:
        self._bus.publish(AGENTS, {"do": "look", "node": node, "reason": why})

    async def run(self) -> None:
        while True:
            await asyncio.sleep(WRITE_EVERY_S)
            try:
                await self._said.flush()
                await self._look_over()
            except SQLAlchemyError as error:
                log.error("cannot write how far system updates are: %s", error)

    async def _look_over(self) -> None:
        """End what has ended without anybody's word, now and then."""
        now = self._now()
        if 0 <= now - self._looked < OVER_EVERY_S:
            return
        self._looked = now
        if await self._database.read_at_once(lambda c: SystemUpdates(c).over(now)):
            async with self._database.write() as connection:
                over = await self._end_over(connection)
            self._gone(over)

    async def close(self) -> None:
        try:
            await self._said.flush()
        except SQLAlchemyError as error:
            log.error("cannot write how far system updates are: %s", error)


async def _existing(connection: Connection, node: str) -> NodeRow:
    row = await Nodes(connection).get(node)
    if row is None:
        raise NotFound("not-found", f"cannot find {node[:40]}: there is no such node")
    return row


def _at_work(node: str, tx: str, step: str, said: float | None) -> Conflict:
    why = f"the node is at work on {tx} ({step})"
    return systems.aborted(node, why + systems.until(said, LAPSE_AFTER_S))


def _begun(why: str, said: float | None) -> Precondition:
    return Precondition("failed-precondition", why + systems.until(said, LAPSE_AFTER_S))
