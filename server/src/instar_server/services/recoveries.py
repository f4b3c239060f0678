"""Recoveries: which node is brought a release by a recovery core, by whose word, and of which release.

Begun by an operator, by a wish with the way `recovery`, and, unless that was switched off, for every node whose
launcher says hello as a beacon: no release runs there. One that failed is tried again after a rest while its wish
stands or its beacon calls. After a restart of the server an operator's goes on, since it is stored; wishes and
beacons begin theirs anew. How one goes: `services.recovery`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from instar.core.errors import InstarError
from instar.core.releases import version_key
from instar.wire.messages import Hello
from instar_server.bus.api import FLEET, Bus, Message
from instar_server.domain import transfers as rules
from instar_server.domain.errors import Conflict, NotFound
from instar_server.domain.looks import SendTo
from instar_server.domain.transfers import Rest
from instar_server.domain.wanted import RECOVERY
from instar_server.services.fleet import Fleet
from instar_server.services.history import History
from instar_server.services.parcels import Parcels
from instar_server.services.ports import Chance, NodeRelease, Now, Recoveries, Releases
from instar_server.services.presence import Channel, Presence
from instar_server.services.progress import Board, View
from instar_server.services.recovery import NOBODY, TICK_S, Plan, Process, Recovery, Said, Tools
from instar_server.services.transfers import BEACON, OPERATOR, WISH, Transfers
from instar_server.services.wishes import Wishes
from instar_server.storage.database import Database
from instar_server.storage.recoveries import Asked, AskedRecoveries

log = logging.getLogger(__name__)

LINES = ("agent", "updater")
MOST_AT_ONCE = 1000  # recoveries of all kinds but an operator's
KEPT_S = 86_400.0  # how long an operator's word counts across restarts of the server


@dataclass(frozen=True, slots=True)
class Parts:
    """What it works with."""

    parcels: Parcels
    transfers: Transfers
    presence: Presence
    releases: Releases
    cores: Recoveries
    wishes: Wishes
    fleet: Fleet
    history: History
    board: Board
    bus: Bus
    database: Database


class Recovering:
    """`run` until cancelled, then `close`. `for_beacons`: begin one for each beacon without being asked."""

    def __init__(self, parts: Parts, for_beacons: bool, now: Now, chance: Chance) -> None:
        self._parts, self._for_beacons, self._now, self._chance = parts, for_beacons, now, chance
        self._open: dict[str, Recovery] = {}
        self._rests: dict[str, Rest] = {}
        self._beginning: set[str] = set()
        self._processes: dict[str, Process] = {}  # of the beacons that are here
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._tools = Tools(
            parts.parcels, parts.transfers, parts.presence, parts.history, parts.board, now,
            lambda node: self._processes.get(node, NOBODY), self._start, self._over, self._wake,
        )  # fmt: skip
        parts.transfers.held = self.is_open

    # ---- who asks for one

    async def begin(self, node: str, version: str, lines: Sequence[str], by: str) -> View:
        """An operator's word: recover these lines of a node, from a release of its own choice or `version`.

        It is stored, and takes the place of what is under way there. Raises NotFound `unknown-node`, `no-release`,
        `no-core`, Conflict `not-connected`, SQLAlchemyError.
        """
        release = await self._choose(node, version)
        return await self._begin(node, release, tuple(lines), OPERATOR, 0, by)

    def wanted(self, want: SendTo) -> None:
        """What a connected node lacks of its wishes, and is to be brought by a recovery core."""
        wishes = [wish for wish in want.wishes if wish.via == RECOVERY]
        recovery = self._open.get(want.node)
        if not want.wishes:
            self._rests.pop(want.node, None)
        if recovery is not None and recovery.plan.cause == WISH:
            _still_wanted(recovery, {wish.digest for wish in wishes}, want.at_work)
        if not wishes or want.at_work or not self._may_begin(want.node, wishes[0].generation):
            return
        first = wishes[0]
        lines = tuple(wish.line for wish in wishes if wish.digest == first.digest)
        release = self._parts.releases.by_program(first.version, first.digest)
        if release is not None:
            self._begin_soon(want.node, release, lines, WISH, first.generation)

    def _for_all_beacons(self) -> None:
        for beacon in self._parts.presence.beacons():
            if self._may_begin(beacon.node, 0):
                self._begin_soon(beacon.node, None, LINES, BEACON, 0)

    def _may_begin(self, node: str, generation: int) -> bool:
        rest = self._rests.get(node)
        busy = node in self._open or node in self._beginning or len(self._open) >= MOST_AT_ONCE
        return not busy and (rest is None or rest.over(generation, self._now()))

    # ---- beginning

    def _begin_soon(
        self, node: str, release: NodeRelease | None, lines: tuple[str, ...], cause: str, generation: int
    ) -> None:
        self._beginning.add(node)
        self._start(self._begin_quietly(node, release, lines, cause, generation))

    async def _begin_quietly(
        self, node: str, release: NodeRelease | None, lines: tuple[str, ...], cause: str, generation: int
    ) -> None:
        try:
            chosen = release if release is not None else await self._choose(node, "")
            await self._begin(node, chosen, lines, cause, generation, "")
        except (InstarError, SQLAlchemyError) as error:
            log.warning("cannot recover %s: %s", node, error)
            self._rest(node, generation)
        finally:
            self._beginning.discard(node)

    async def _begin(
        self, node: str, release: NodeRelease, lines: tuple[str, ...], cause: str, generation: int, by: str
    ) -> View:
        core = self._parts.cores.newest()
        if core is None:
            raise NotFound("no-core", f"cannot recover {node}: no recovery core is published")
        if self._parts.presence.channel(node) is None:
            raise Conflict("not-connected", f"cannot recover {node}: it is not connected")
        plan = Plan(f"r-{self._chance(12)}", node, release, core, lines, cause, generation)
        if cause == OPERATOR:
            asked = Asked(plan.id, node, release.version, release.digest, lines, self._now())
            await self._parts.database.write_at_once(lambda c: AskedRecoveries(c).add(asked))
        recovery, view = self._open_one(plan)
        why = {OPERATOR: f"asked by {by}", WISH: "as its wish says"}.get(cause, "no release runs there")
        text = f"{view.line} to {release.version} by recovery core {core.version}: {why}"
        await recovery.note("begun", "", text)
        if not recovery.over:
            recovery.send()
        return view

    def _open_one(self, plan: Plan) -> tuple[Recovery, View]:
        """In the place of the one that was under way there."""
        before = self._open.get(plan.node)
        if before is not None:
            before.drop()
        release = plan.release
        view = self._parts.board.begin(
            plan.node, line=",".join(plan.lines), via=RECOVERY, cause=plan.cause, version=release.version,
            digest=release.digest, state="queued", core=plan.core.version,
        )  # fmt: skip
        recovery = self._open[plan.node] = Recovery(plan, view, self._tools)
        return recovery, view

    async def _choose(self, node: str, version: str) -> NodeRelease:
        """`version`, else what is wanted, else what the node last ran, else the newest. Raises NotFound."""
        releases = self._parts.releases
        if version:
            found = releases.by_version(version)
            if found is None:
                raise NotFound("no-release", f"cannot recover to {version[:64]}: it is not published")
            return found
        wishes = await self._parts.wishes.of_node(node)
        likely = [(w.version, w.digest) for w in (wishes.get(line) for line in LINES) if w is not None]
        likely.append((await self._parts.fleet.node(node)).agent)
        for each in likely:
            found = releases.by_program(*each)
            if found is not None:
                return found
        published = releases.all()
        if not published:
            raise NotFound("no-release", f"cannot recover {node}: no release is published")
        return max(published, key=lambda release: version_key(release.version))

    # ---- ending

    def _over(self, recovery: Recovery, dropped: bool) -> None:
        plan = recovery.plan
        del self._open[plan.node]
        if not dropped:
            self._rest(plan.node, plan.generation)  # also after a good end: no loop without one
        if plan.cause == OPERATOR:
            self._start(self._forget(plan.id))
        self._wake.set()

    def _rest(self, node: str, generation: int) -> None:
        spread = int(self._chance(2), 16) / 65_536
        before = self._rests.get(node)
        self._rests[node] = rules.rest(before, generation, "failed", self._now(), spread)

    # ---- what outlives this process

    async def _forget(self, id_: str) -> None:
        try:
            await self._parts.database.write_at_once(lambda c: AskedRecoveries(c).remove(id_))
        except SQLAlchemyError as error:
            log.error("cannot forget the recovery %s, which goes on after a restart: %s", id_, error)

    async def _resume(self) -> None:
        """Go on with what operators asked for: told again by the same id, a core that still runs is not begun twice."""
        try:
            rows = await self._parts.database.read_at_once(lambda c: AskedRecoveries(c).all())
        except SQLAlchemyError as error:
            log.error("cannot see which recoveries were under way: %s", error)
            return
        for row in rows:
            release = self._parts.releases.by_program(row.version, row.digest)
            core = self._parts.cores.newest()
            if release is None or core is None or self._now() - row.asked > KEPT_S:
                await self._forget(row.id)
                continue
            recovery, _ = self._open_one(Plan(row.id, row.node, release, core, row.lines, OPERATOR))
            recovery.wait(0.0)

    # ---- what nodes say

    def hear(self, channel: Channel, said: Said) -> None:
        """Of recoveries that are not under way nothing is kept."""
        recovery = self._open.get(channel.node)
        if recovery is not None:
            recovery.hear(said)

    def beacon(self, channel: Channel, hello: Hello) -> None:
        """A beacon has been welcomed: the old agent is gone."""
        self._processes[channel.node] = process = (hello.boot_id, hello.pid)
        recovery = self._open.get(channel.node)
        if recovery is not None:
            recovery.beacon_came(process)
        self._wake.set()

    def beacon_left(self, channel: Channel) -> None:
        self._processes.pop(channel.node, None)

    def joined(self, node: str) -> None:
        """An agent has come."""
        recovery = self._open.get(node)
        if recovery is not None:
            recovery.agent_came()

    def _event(self, message: Message) -> None:
        """What a node's updater tells of its transactions. Beside a beacon it may be old."""
        body = message.body
        if body["kind"] != "event" or body["phase"] != "confirmed":
            return
        recovery = self._open.get(body["node"])
        if recovery is None or not recovery.installing or body["source"] != History.NODE:
            return
        if body["digest"] == recovery.plan.release.digest and not self._parts.presence.beacon(body["node"]):
            recovery.confirmed(body["line"])

    # ---- what others ask

    def is_open(self, node: str) -> bool:
        """Whether a recovery of this node is under way, or waits for it to come back."""
        return node in self._open

    def serves(self, node: str, path: str) -> bool:
        """Whether the node's core may fetch this from the port where the channel is, even when artifacts have a
        port of their own: `path` is that of a target, '' means metadata."""
        recovery = self._open.get(node)
        if recovery is None:
            return False
        release = recovery.plan.release
        folder, _, name = release.target.rpartition("/")
        return path in ("", f"{folder}/{release.sha256}.{name}")

    # ---- what time brings

    async def run(self) -> None:
        subscription = self._parts.bus.subscribe(FLEET, self._event)
        try:
            await self._resume()
            while True:
                self._wake.clear()
                for recovery in tuple(self._open.values()):
                    recovery.tick(self._now())
                if self._for_beacons:
                    self._for_all_beacons()
                try:
                    async with asyncio.timeout(TICK_S):
                        await self._wake.wait()
                except TimeoutError:
                    continue
        finally:
            subscription.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        if self._tasks:
            await asyncio.wait(tuple(self._tasks), timeout=2.0)


def _still_wanted(recovery: Recovery, digests: set[str], at_work: bool) -> None:
    """End one of a wish when that is not wanted, or not lacking, any more."""
    if recovery.plan.release.digest in digests:
        return
    if not recovery.installing:
        recovery.drop()
    elif not at_work and recovery.runs_everywhere():
        recovery.end(True, "", "the node runs it")
