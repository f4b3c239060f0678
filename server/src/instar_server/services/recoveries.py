"""Recoveries: a recovery core is sent to a node, told what to fetch, and listened to until it has ended.

    sending --the core is there, `agentupdate`--> installing --`agentupdate-ended`--> over
       ^  |                                           |
       |  +-- the channel ended --> resting           +-- nothing heard for SILENCE_S: what runs there decides
       +--------------------------------+

Begun by an operator, by a wish with the way `recovery`, and, unless that was switched off, for every node whose
launcher says hello as a beacon: no release runs there. One that failed is tried again after a rest while its wish
stands or its beacon calls. All of this is in memory: after a restart of the server, wishes and beacons begin
theirs anew, and an operator asks again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from instar.core.errors import InstarError
from instar.core.releases import version_key
from instar.wire.messages import (
    AgentUpdate,
    AgentUpdateDownloaded,
    AgentUpdateEnded,
    AgentUpdateProgress,
    Hello,
)
from instar_server.bus.api import FLEET, Bus, Message
from instar_server.domain import transfers as rules
from instar_server.domain.errors import Conflict, NotFound
from instar_server.domain.looks import SendTo
from instar_server.domain.transfers import Rest
from instar_server.domain.wanted import RECOVERY
from instar_server.services.fleet import Fleet
from instar_server.services.history import History, server_entry
from instar_server.services.parcels import Parcels
from instar_server.services.ports import Chance, NodeRelease, Now, Recoveries, RecoveryCore, Releases
from instar_server.services.presence import Channel, Presence
from instar_server.services.progress import Board, View
from instar_server.services.sending import CUT, DROPPED, Ended, Request
from instar_server.services.transfers import BEACON, OPERATOR, WISH, Transfers
from instar_server.services.wishes import Wishes

log = logging.getLogger(__name__)

LINES = ("agent", "updater")
TICK_S = 1.0
SILENCE_S = 1000.0  # a little longer than a node lets a core run
BACK_S = (
    15.0  # how long a node may be back while nothing is heard of its core: a beacon's counts as ended then
)
STILL_RUNS = "recovery-running"  # what an agent says of a core that one before it started
MOST_AWAY_S = 3600.0  # a recovery whose node is away for longer is forgotten
MOST_TRIES = 5  # of an operator's: somebody waits for it
MOST_AT_ONCE = 1000  # recoveries of all kinds but an operator's

Said = AgentUpdateProgress | AgentUpdateDownloaded | AgentUpdateEnded


class State(Enum):
    SENDING = "sending"
    INSTALLING = "installing"
    RESTING = "resting"


@dataclass(slots=True)
class _Recovery:
    id: str
    node: str
    release: NodeRelease
    core: RecoveryCore
    lines: tuple[str, ...]
    cause: str
    generation: int
    view: View
    heard: float
    state: State = State.SENDING
    process: tuple[str, int] = ("", 0)  # of the beacon that was told
    back: float = 0.0  # when another beacon than that one came, or an agent
    tries: int = 0
    due: float = 0.0
    confirmed: set[str] = field(default_factory=set)


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


class Recovering:
    """`run` until cancelled. `for_beacons`: begin one for each beacon without being asked."""

    def __init__(self, parts: Parts, for_beacons: bool, now: Now, chance: Chance) -> None:
        self._parts, self._for_beacons, self._now, self._chance = parts, for_beacons, now, chance
        self._open: dict[str, _Recovery] = {}
        self._rests: dict[str, Rest] = {}
        self._beginning: set[str] = set()
        self._processes: dict[str, tuple[str, int]] = {}  # of the beacons that are here
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        parts.transfers.held = self.is_open

    # ---- beginning

    async def begin(self, node: str, version: str, lines: Sequence[str], by: str) -> View:
        """An operator's word: recover these lines of a node, from a release of its own choice or `version`.

        Takes the place of what is under way there. Raises NotFound `unknown-node`, `no-release`, `no-core`,
        Conflict `not-connected`.
        """
        release = await self._choose(node, version)
        return await self._begin(node, release, tuple(lines), OPERATOR, 0, by)

    def wanted(self, want: SendTo) -> None:
        """What a connected node lacks of its wishes, and is to be brought by a recovery core."""
        wishes = [wish for wish in want.wishes if wish.via == RECOVERY]
        recovery = self._open.get(want.node)
        if not want.wishes:
            self._rests.pop(want.node, None)
        if recovery is not None and recovery.cause == WISH:
            self._still_wanted(recovery, {wish.digest for wish in wishes}, want.at_work)
        if not wishes or want.at_work or not self._may_begin(want.node, wishes[0].generation):
            return
        first = wishes[0]
        lines = tuple(wish.line for wish in wishes if wish.digest == first.digest)
        release = self._parts.releases.by_program(first.version, first.digest)
        if release is not None:
            self._begin_soon(want.node, release, lines, WISH, first.generation)

    def _still_wanted(self, recovery: _Recovery, digests: set[str], at_work: bool) -> None:
        if recovery.release.digest in digests:
            return
        if recovery.state is not State.INSTALLING:
            self._drop(recovery)
        elif not at_work and self._runs_everywhere(recovery):
            self._end(recovery, True, "", "the node runs it")

    def _may_begin(self, node: str, generation: int) -> bool:
        rest = self._rests.get(node)
        busy = node in self._open or node in self._beginning or len(self._open) >= MOST_AT_ONCE
        return not busy and (rest is None or rest.over(generation, self._now()))

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
            self._rest(node, generation, "failed")
        finally:
            self._beginning.discard(node)

    async def _begin(
        self, node: str, release: NodeRelease, lines: tuple[str, ...], cause: str, generation: int, by: str
    ) -> View:
        parts = self._parts
        core = parts.cores.newest()
        if core is None:
            raise NotFound("no-core", f"cannot recover {node}: no recovery core is published")
        if parts.presence.channel(node) is None:
            raise Conflict("not-connected", f"cannot recover {node}: it is not connected")
        before = self._open.get(node)
        if before is not None:
            self._drop(before)
        view = parts.board.begin(
            node, line=",".join(lines), via=RECOVERY, cause=cause, version=release.version,
            digest=release.digest, state="queued", core=core.version,
        )  # fmt: skip
        id_, now = f"r-{self._chance(12)}", self._now()
        recovery = _Recovery(id_, node, release, core, lines, cause, generation, view, now)
        self._open[node] = recovery
        asked = {OPERATOR: f"asked by {by}", WISH: "as its wish says"}.get(cause, "no release runs there")
        text = f"{view.line} to {release.version} by recovery core {core.version}: {asked}"
        await self._note(recovery, "begun", "", text)
        if self._open.get(node) is recovery:
            self._send(recovery)
        return view

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

    # ---- the core's way to the node

    def _send(self, recovery: _Recovery) -> None:
        core = recovery.core
        recovery.state, recovery.heard = State.SENDING, self._now()

        def done(_request: Request, ended: Ended) -> None:
            self._sent(recovery, ended)

        cause = recovery.cause
        request = Request(
            recovery.node, rules.RECOVERY, core.version, core.digest, core.target, cause, recovery.view,
            recovery.generation, done,
        )  # fmt: skip
        if not self._parts.transfers.ask(request):
            self._wait(recovery, rules.FLOOR_S)

    def _sent(self, recovery: _Recovery, ended: Ended) -> None:
        if self._open.get(recovery.node) is not recovery:
            return
        if ended.how == rules.State.RECEIVED.value:
            self._start(self._tell(recovery, ended.parcel))
        elif ended.how == CUT:
            self._parts.board.note(recovery.view, state="cut")
            self._wait(recovery, 0.0 if ended.moved else rules.FLOOR_S)
        elif ended.how == rules.State.DECLINED.value:
            self._end(recovery, False, "never", ended.text)
        elif recovery.cause == OPERATOR and recovery.tries + 1 < MOST_TRIES and ended.how != DROPPED:
            recovery.tries += 1
            self._parts.board.note(recovery.view, code=ended.code, text=ended.text)
            self._wait(recovery, min(rules.CAP_S, rules.FLOOR_S * 2.0 ** (recovery.tries - 1)))
        else:
            self._end(recovery, False, ended.code or ended.how, ended.text)

    def _wait(self, recovery: _Recovery, seconds: float) -> None:
        recovery.state, recovery.due = State.RESTING, self._now() + seconds
        self._wake.set()

    async def _tell(self, recovery: _Recovery, parcel: str) -> None:
        """Tell the node to run the core that it has."""
        release, parts = recovery.release, self._parts
        try:
            sha384 = await parts.parcels.archive_sha384(release.target)
            url = parts.parcels.url_path(release.target)
        except (InstarError, OSError) as error:
            code = error.code if isinstance(error, InstarError) else "disk-failed"
            self._end(recovery, False, code, str(error))
            return
        channel = parts.presence.channel(recovery.node)
        if self._open.get(recovery.node) is not recovery:
            return
        order = AgentUpdate(
            recovery.id, url, sha384, release.version, release.digest, release.target, parcel,
            list(recovery.lines),
        )  # fmt: skip
        recovery.state, recovery.heard, recovery.back = State.INSTALLING, self._now(), 0.0
        recovery.process = self._processes.get(recovery.node, ("", 0))
        if recovery.cause != BEACON:  # of what runs already no transaction need tell
            recovery.confirmed = {line for line in recovery.lines if self._runs(recovery, line)}
        parts.board.note(recovery.view, state="installing", phase="told", percent=-1.0, code="", text="")
        if channel is None or not await channel.send(order):
            self._wait(recovery, 0.0)

    # ---- what nodes say

    def hear(self, channel: Channel, said: Said) -> None:
        """Of recoveries that are not under way nothing is kept."""
        recovery = self._open.get(channel.node)
        if recovery is None or recovery.id != said.id:
            return
        recovery.heard, recovery.back = self._now(), 0.0
        note = self._parts.board.note
        if isinstance(said, AgentUpdateProgress):
            percent = said.percent if -1.0 <= said.percent <= 100.0 else -1.0
            note(recovery.view, phase=said.phase[:64], percent=percent, text=said.text[:500])
        elif isinstance(said, AgentUpdateDownloaded):
            note(recovery.view, phase="downloaded", percent=100.0, text="")
            text = f"{recovery.release.version} was fetched: {said.sha384[:12]}"
            self._start(self._note(recovery, "downloaded", "", text))
        elif not said.ok and said.code == STILL_RUNS:
            recovery.back = self._now()
        else:
            self._end(recovery, said.ok, said.code[:64], said.text[:2000])

    def beacon(self, channel: Channel, hello: Hello) -> None:
        """A beacon has been welcomed: the old agent is gone."""
        self._processes[channel.node] = process = (hello.boot_id, hello.pid)
        recovery = self._open.get(channel.node)
        if recovery is not None:
            if recovery.state is State.RESTING:
                recovery.due = min(recovery.due, self._now() + TICK_S)
            elif recovery.state is State.INSTALLING and recovery.process != process:
                recovery.back = self._now()
        self._wake.set()

    def beacon_left(self, channel: Channel) -> None:
        self._processes.pop(channel.node, None)

    def joined(self, node: str) -> None:
        """An agent has come: one that waits for its node goes on."""
        recovery = self._open.get(node)
        if recovery is not None and recovery.state is State.RESTING:
            self._wake.set()
        elif recovery is not None and recovery.state is State.INSTALLING:
            recovery.back = self._now()  # it may know nothing of its core, which may be gone as well

    def _event(self, message: Message) -> None:
        """What a node's updater tells of its transactions. Beside a beacon it may be old."""
        body = message.body
        if body["kind"] != "event" or body["phase"] != "confirmed":
            return
        recovery = self._open.get(body["node"])
        if recovery is None or recovery.state is not State.INSTALLING or body["source"] != History.NODE:
            return
        if body["digest"] != recovery.release.digest or self._parts.presence.beacon(recovery.node):
            return
        recovery.confirmed.add(body["line"])
        recovery.heard = self._now()
        if recovery.confirmed.issuperset(recovery.lines):
            self._end(recovery, True, "", "confirmed")

    # ---- ending

    def _end(self, recovery: _Recovery, ok: bool, code: str, text: str) -> None:
        if self._open.get(recovery.node) is not recovery:
            return
        del self._open[recovery.node]
        state = "done" if ok else "declined" if code == "never" else "failed"
        phase = "" if ok else recovery.view.phase
        self._parts.board.note(recovery.view, ended=True, state=state, phase=phase, code=code, text=text)
        self._rest(recovery.node, recovery.generation, "failed")  # also after a good end: no loop without one
        told = f"recovery to {recovery.release.version}: {text or code or 'done'}"
        self._start(self._note(recovery, "ended" if ok else "failed", code, told))
        self._wake.set()

    def _drop(self, recovery: _Recovery) -> None:
        """Something else takes its place, or it is wanted no more."""
        del self._open[recovery.node]
        self._parts.board.note(recovery.view, ended=True, state="dropped")
        if recovery.state is State.SENDING:
            self._parts.transfers.cancel(recovery.node)

    def _rest(self, node: str, generation: int, how: str) -> None:
        spread = int(self._chance(2), 16) / 65_536
        self._rests[node] = rules.rest(self._rests.get(node), generation, how, self._now(), spread)

    async def _note(self, recovery: _Recovery, what: str, code: str, text: str) -> None:
        release = recovery.release
        entry = server_entry(
            f"recovery-{what}:{recovery.id}", f"recovery-{what}", self._now(), code, text[:2000],
            recovery.lines[0], release.version, release.digest,
        )  # fmt: skip
        try:
            await self._parts.history.note(recovery.node, entry)
        except SQLAlchemyError as error:
            log.error("cannot store what happened to %s: %s", recovery.node, error)

    def _runs_everywhere(self, recovery: _Recovery) -> bool:
        return all(self._runs(recovery, line) for line in recovery.lines)

    def _runs(self, recovery: _Recovery, line: str) -> bool:
        live = self._parts.presence.get(recovery.node)
        agent, updater = live.digest if live is not None else "", self._parts.presence.updater(recovery.node)
        return (agent if line == "agent" else updater) == recovery.release.digest

    # ---- what time brings

    async def run(self) -> None:
        subscription = self._parts.bus.subscribe(FLEET, self._event)
        try:
            while True:
                self._wake.clear()
                self._tick(self._now())
                try:
                    async with asyncio.timeout(TICK_S):
                        await self._wake.wait()
                except TimeoutError:
                    continue
        finally:
            subscription.close()

    def _tick(self, now: float) -> None:
        for recovery in tuple(self._open.values()):
            if recovery.state is State.RESTING:
                self._go_on(recovery, now)
            elif recovery.state is State.INSTALLING:
                self._look_after(recovery, now)
        if self._for_beacons:
            for beacon in self._parts.presence.beacons():
                if self._may_begin(beacon.node, 0):
                    self._begin_soon(beacon.node, None, LINES, BEACON, 0)

    def _go_on(self, recovery: _Recovery, now: float) -> None:
        if now - recovery.heard > MOST_AWAY_S:
            self._end(recovery, False, "node-away", f"the node was away for {MOST_AWAY_S:g} s")
        elif now >= recovery.due and self._parts.presence.channel(recovery.node) is not None:
            self._send(recovery)

    def _look_after(self, recovery: _Recovery, now: float) -> None:
        if recovery.back and now - recovery.back > BACK_S:
            if self._parts.presence.beacon(recovery.node):
                self._end(recovery, False, "beacon-is-back", "the core has ended without a word")
            else:
                self._send(recovery)  # told again: an agent whose core still runs says so
        elif now - recovery.heard > SILENCE_S:
            ok = self._runs_everywhere(recovery)
            text = "the node runs it" if ok else f"nothing was heard of it for {SILENCE_S:g} s"
            self._end(recovery, ok, "" if ok else "no-word", text)

    def is_open(self, node: str) -> bool:
        """Whether a recovery of this node is under way, or waits for it to come back."""
        return node in self._open

    def serves(self, node: str, path: str) -> bool:
        """Whether the node's core may fetch this from the port where the channel is, even when artifacts have a
        port of their own: `path` is that of a target, '' means metadata."""
        recovery = self._open.get(node)
        if recovery is None:
            return False
        folder, _, name = recovery.release.target.rpartition("/")
        return path in ("", f"{folder}/{recovery.release.sha256}.{name}")

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        if self._tasks:
            await asyncio.wait(tuple(self._tasks), timeout=2.0)
