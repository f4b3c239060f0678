"""One recovery: a core on its way to a node, told what to fetch, and listened to until it has ended.

    sending --the core is there, `agentupdate`--> installing --`agentupdate-ended`--> over
       ^  |                                           |
       |  +-- the channel ended --> resting           +-- nothing heard for SILENCE_S: what runs there decides
       +--------------------------------+

It asks nobody for anything: its owner hands it what the node says, the channels that come, and the time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from instar.core.errors import InstarError
from instar.wire.messages import AgentUpdate, AgentUpdateDownloaded, AgentUpdateEnded, AgentUpdateProgress
from instar_server.domain import transfers as rules
from instar_server.services.history import History, server_entry
from instar_server.services.parcels import Parcels
from instar_server.services.ports import NodeRelease, Now, RecoveryCore
from instar_server.services.presence import Presence
from instar_server.services.progress import Board, View
from instar_server.services.sending import CUT, DROPPED, Ended, Request
from instar_server.services.transfers import BEACON, OPERATOR, Transfers

log = logging.getLogger(__name__)

TICK_S = 1.0
SILENCE_S = 1000.0  # a little longer than a node lets a core run
# How long a node may be back while nothing is heard of its core: a beacon's counts as ended then.
BACK_S = 15.0
# What a node says while another core runs: one that an agent before it started, or that has another order.
BARRED = frozenset({"recovery-running", "busy"})
MOST_AWAY_S = 3600.0  # a recovery whose node is away for longer is forgotten
MOST_TRIES = 5  # of an operator's: somebody waits for it

Said = AgentUpdateProgress | AgentUpdateDownloaded | AgentUpdateEnded
Process = tuple[str, int]  # boot and pid
NOBODY: Process = ("", 0)


class State(Enum):
    SENDING = "sending"
    INSTALLING = "installing"
    RESTING = "resting"
    OVER = "over"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is brought to a node, by which core, and why."""

    id: str
    node: str
    release: NodeRelease
    core: RecoveryCore
    lines: tuple[str, ...]
    cause: str
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Tools:
    """What every recovery works with. `process`: of the beacon that is there, or NOBODY. `start` runs something
    beside. `over` is told once of each that is over, and whether that is since it was dropped. `wake` is rung
    when one may go on."""

    parcels: Parcels
    transfers: Transfers
    presence: Presence
    history: History
    board: Board
    now: Now
    process: Callable[[str], Process]
    start: Callable[[Coroutine[Any, Any, None]], None]
    over: Callable[[Recovery, bool], None]
    wake: asyncio.Event


class Recovery:
    """`send` it, or let it `wait`. Once it is over, nothing changes it."""

    def __init__(self, plan: Plan, view: View, tools: Tools) -> None:
        self.plan, self._view, self._tools = plan, view, tools
        self._state, self._heard = State.SENDING, tools.now()
        self._process = NOBODY  # of the beacon that was told
        self._back = 0.0  # when another beacon than that one came, or an agent; or when the node said BARRED
        self._barred = 0.0  # since when another core has kept this one from its work; 0: none does
        self._tries, self._due = 0, 0.0
        self._confirmed: set[str] = set()

    @property
    def over(self) -> bool:
        return self._state is State.OVER

    @property
    def installing(self) -> bool:
        return self._state is State.INSTALLING

    # ---- the core's way to the node

    def send(self) -> None:
        plan = self.plan
        self._state, self._heard = State.SENDING, self._tools.now()
        request = Request(
            plan.node, rules.RECOVERY, plan.core.version, plan.core.digest, plan.core.target, plan.cause,
            self._view, plan.generation, self._sent,
        )  # fmt: skip
        if not self._tools.transfers.ask(request):
            self.wait(rules.FLOOR_S)

    def _sent(self, _request: Request, ended: Ended) -> None:
        if self.over:
            return
        board = self._tools.board
        if ended.how == rules.State.RECEIVED.value:
            self._tools.start(self._tell(ended.parcel))
        elif ended.how == CUT:
            board.note(self._view, state="cut")
            self.wait(0.0 if ended.moved else rules.FLOOR_S)
        elif ended.how == rules.State.DECLINED.value:
            self.end(False, "never", ended.text)
        elif self.plan.cause == OPERATOR and self._tries + 1 < MOST_TRIES and ended.how != DROPPED:
            self._tries += 1
            board.note(self._view, code=ended.code, text=ended.text)
            self.wait(min(rules.CAP_S, rules.FLOOR_S * 2.0 ** (self._tries - 1)))
        else:
            self.end(False, ended.code or ended.how, ended.text)

    def wait(self, seconds: float) -> None:
        """Go on then, if the node is there."""
        self._state, self._due = State.RESTING, self._tools.now() + seconds
        self._tools.wake.set()

    async def _tell(self, parcel: str) -> None:
        """Tell the node to run the core that it has."""
        plan, tools = self.plan, self._tools
        try:
            sha384 = await tools.parcels.archive_sha384(plan.release.target)
            url = tools.parcels.url_path(plan.release.target)
        except InstarError as error:
            self.end(False, error.code, str(error))
            return
        channel = tools.presence.channel(plan.node)
        if self.over:
            return
        order = AgentUpdate(
            plan.id, url, sha384, plan.release.version, plan.release.digest, plan.release.target, parcel,
            list(plan.lines),
        )  # fmt: skip
        self._state, self._heard, self._back = State.INSTALLING, tools.now(), 0.0
        self._process = tools.process(plan.node)
        if plan.cause != BEACON:  # of what runs already no transaction need tell
            self._confirmed = {line for line in plan.lines if self._runs(line)}
        tools.board.note(self._view, state="installing", phase="told", percent=-1.0, code="", text="")
        if channel is None or not await channel.send(order):
            self.wait(0.0)

    # ---- what the node says

    def hear(self, said: Said) -> None:
        """Of another recovery: nothing."""
        if self.over or self.plan.id != said.id:
            return
        self._heard, self._back = self._tools.now(), 0.0
        note = self._tools.board.note
        if isinstance(said, AgentUpdateProgress):
            percent = said.percent if -1.0 <= said.percent <= 100.0 else -1.0
            note(self._view, phase=said.phase[:64], percent=percent, text=said.text[:500])
            if said.phase != "verify":  # which comes before it is found out
                self._barred = 0.0
        elif isinstance(said, AgentUpdateDownloaded):
            note(self._view, phase="downloaded", percent=100.0, text="")
            text = f"{self.plan.release.version} was fetched: {said.sha384[:12]}"
            self._tools.start(self.note("downloaded", "", text))
        elif not said.ok and said.code in BARRED and not self._barred_for_long():
            self._back = self._heard
            self._barred = self._barred or self._heard
            note(self._view, code=said.code, text=said.text[:2000])
        else:
            self.end(said.ok, said.code[:64], said.text[:2000])

    def _barred_for_long(self) -> bool:
        """Longer than any core may run: then there is no waiting for its end."""
        return self._barred > 0 and self._tools.now() - self._barred > SILENCE_S

    def confirmed(self, line: str) -> None:
        """The node's updater tells that this line runs the release."""
        self._confirmed.add(line)
        self._heard = self._tools.now()
        if self._confirmed.issuperset(self.plan.lines):
            self.end(True, "", "confirmed")

    def beacon_came(self, process: Process) -> None:
        if self._state is State.RESTING:
            self._due = min(self._due, self._tools.now() + TICK_S)
        elif self._state is State.INSTALLING and self._process != process:
            self._back = self._tools.now()
        self._tools.wake.set()

    def agent_came(self) -> None:
        """One that waits for its node goes on."""
        if self._state is State.RESTING:
            self._tools.wake.set()
        elif self._state is State.INSTALLING:
            self._back = self._tools.now()  # it may know nothing of its core, which may be gone as well

    # ---- ending

    def end(self, ok: bool, code: str, text: str) -> None:
        if self.over:
            return
        state = "done" if ok else "declined" if code == "never" else "failed"
        phase = "" if ok else self._view.phase
        self._tools.board.note(self._view, ended=True, state=state, phase=phase, code=code, text=text)
        told = f"recovery to {self.plan.release.version}: {text or code or 'done'}"
        self._tools.start(self.note("ended" if ok else "failed", code, told))
        self._finish(False)

    def drop(self) -> None:
        """Something else takes its place, or it is wanted no more."""
        if self.over:
            return
        self._tools.board.note(self._view, ended=True, state="dropped")
        sending = self._state is State.SENDING
        self._finish(True)
        if sending:
            self._tools.transfers.cancel(self.plan.node)

    def _finish(self, dropped: bool) -> None:
        self._state = State.OVER
        self._tools.over(self, dropped)

    async def note(self, what: str, code: str, text: str) -> None:
        """An entry in the node's history."""
        plan = self.plan
        entry = server_entry(
            f"recovery-{what}:{plan.id}", f"recovery-{what}", self._tools.now(), code, text[:2000],
            plan.lines[0], plan.release.version, plan.release.digest,
        )  # fmt: skip
        try:
            await self._tools.history.note(plan.node, entry)
        except SQLAlchemyError as error:
            log.error("cannot store what happened to %s: %s", plan.node, error)

    def runs_everywhere(self) -> bool:
        """Whether the node runs the release on all lines, as far as it says."""
        return all(self._runs(line) for line in self.plan.lines)

    def _runs(self, line: str) -> bool:
        presence, node = self._tools.presence, self.plan.node
        live = presence.get(node)
        agent, updater = live.digest if live is not None else "", presence.updater(node)
        return (agent if line == "agent" else updater) == self.plan.release.digest

    # ---- what time brings

    def tick(self, now: float) -> None:
        if self._state is State.RESTING:
            self._go_on(now)
        elif self._state is State.INSTALLING:
            self._look_after(now)

    def _go_on(self, now: float) -> None:
        if now - self._heard > MOST_AWAY_S:
            self.end(False, "node-away", f"the node was away for {MOST_AWAY_S:g} s")
        elif now >= self._due and self._tools.presence.channel(self.plan.node) is not None:
            self.send()

    def _look_after(self, now: float) -> None:
        if self._back and now - self._back > BACK_S:
            if self._tools.presence.beacon(self.plan.node) and not self._barred:
                self.end(False, "beacon-is-back", "the core has ended without a word")
            else:
                self.send()  # told again: whoever's core still runs says so
        elif now - self._heard > SILENCE_S:
            ok = self.runs_everywhere()
            text = "the node runs it" if ok else f"nothing was heard of it for {SILENCE_S:g} s"
            self.end(ok, "" if ok else "no-word", text)
