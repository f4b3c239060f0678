"""Recovery (requirement M5): run the recovery core that the server has sent, and tell the server what it says.

Loaded when the first `agentupdate` comes. The core fetches and installs by itself, and will replace this
agent too: we only see that it is signed, start it outside of our reach, and forward its words while we live.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable

from instar.agent.aside import aside
from instar.agent.control import Inflow, Tail
from instar.agent.spawn import open_pidfd
from instar.core.errors import InstarError, MachineError
from instar.host import rescue
from instar.host.clock import Clock
from instar.host.files import failed
from instar.host.layout import Layout
from instar.host.program import Program
from instar.wire.messages import AgentUpdate, AgentUpdateEnded, AgentUpdateProgress, Message

STDERR_TAIL = 4_096  # bytes
POLL_S = 0.1  # where the kernel has no pidfd
EVERY_S = 0.05  # least time between two reports of one phase
KILLED_WITHIN_S = 5.0  # for a core that was killed to be gone

log = logging.getLogger("instar.agent")


class Recovery:
    """`send` writes to the present connection, if there is one. `server` is its address, https://host:port."""

    def __init__(
        self,
        layout: Layout,
        program: Program,
        server: str,
        clock: Clock,
        send: Callable[[Message], bool],
        within_s: float = rescue.WITHIN_S,
        over: Callable[[], None] = lambda: None,
    ) -> None:
        """`over` is called when a core has ended, well or not: it has had the updater's place meanwhile."""
        self._layout, self._program, self._server, self._clock = layout, program, server, clock
        self._send, self._within_s, self._over = send, within_s, over
        self._order: tuple[AgentUpdate, str] | None = None
        self._ordered = asyncio.Event()

    def take(self, order: AgentUpdate, pin: str) -> None:
        """`pin`: SHA-256 of the certificate that the server showed. Raises InputError `bad-order`.

        One at a time: another order meanwhile is answered as `busy`, the same one again with nothing.
        """
        rescue.check_order(order)
        if self._order is None:
            self._order = (order, pin)
            self._ordered.set()
        elif self._order[0].id != order.id:
            text = f"cannot recover: the recovery {self._order[0].id[:80]!a} is under way"
            self._send(AgentUpdateEnded(order.id, False, "busy", text))

    async def run(self) -> None:
        """Until cancelled. A core that runs then goes on: it is most likely the one that ends us."""
        while True:
            await self._ordered.wait()
            self._ordered.clear()
            if self._order is None:
                continue
            order, pin = self._order
            try:
                ended = await self._recover(order, pin)
            except InstarError as error:
                ended = AgentUpdateEnded(order.id, False, error.code, error.text)
            except OSError as error:
                fault = failed("use", self._layout.run, error)
                ended = AgentUpdateEnded(order.id, False, fault.code, fault.text)
            finally:
                self._order = None
            how = "done" if ended.ok else f"failed: {ended.text!a:.500} ({ended.code})"
            log.warning("recovery %s: %s", ascii(order.id)[:80], how)
            self._send(ended)

    async def _recover(self, order: AgentUpdate, pin: str) -> AgentUpdateEnded:
        self._send(AgentUpdateProgress(order.id, "verify"))
        layout = self._layout
        programs = [p for p in (layout.launcher, self._program.path) if p.exists()]
        await aside(lambda: rescue.check_idle(layout, self._clock))
        core, file = await aside(lambda: rescue.prepare(layout, order, programs, pin, self._server))
        log.warning("recovery %s: starting the core %s", ascii(order.id)[:80], order.core[:12])
        self._send(AgentUpdateProgress(order.id, "start"))
        running = await aside(lambda: rescue.start(layout, core, file, self._clock, self._within_s))
        over = True
        try:
            return await _Running(order.id, running, self._send).follow(self._within_s)
        except asyncio.CancelledError:
            over = False  # we are stopped, most likely by the core, which needs no updater beside it
            raise
        finally:
            if over:
                self._over()


class _Running:
    """One core, and what it says."""

    def __init__(self, order_id: str, core: rescue.Core, send: Callable[[Message], bool]) -> None:
        self._id, self._core, self._send = order_id, core, send
        self._loop = asyncio.get_running_loop()
        self._rest = bytearray()
        self._ended: AgentUpdateEnded | None = None
        self._told: tuple[str, float] = ("", 0.0)
        self._words = Inflow(core.stdout, self._take)
        self._tail = Tail(core.stderr, STDERR_TAIL)

    async def follow(self, within_s: float) -> AgentUpdateEnded:
        """Forward what it says until it has ended; kill it when it does not end in time."""
        try:
            late = not await self._gone(within_s)
            if late:
                await aside(self._core.kill)
                await self._gone(KILLED_WITHIN_S)
            self._words.drain()
            self._tail.drain()
            status = self._core.poll()
            if status is None:
                raise MachineError("not-gone", "cannot end the recovery core: it is there after SIGKILL")
            return rescue.outcome(self._id, status, self._ended, self._tail.text(), late)
        finally:
            self._words.close()
            self._tail.close()

    async def _gone(self, within_s: float) -> bool:
        """Whether it has ended within `within_s`. Its pipes do not tell: what it started may hold them."""
        end, woken = self._loop.time() + within_s, asyncio.Event()
        pidfd = open_pidfd(self._core.pid)
        if pidfd >= 0:
            self._loop.add_reader(pidfd, woken.set)
        try:
            while self._core.poll() is None and (left := end - self._loop.time()) > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left if pidfd >= 0 else min(POLL_S, left)):
                        await woken.wait()
        finally:
            if pidfd >= 0:
                self._loop.remove_reader(pidfd)
                os.close(pidfd)
        return self._core.poll() is not None

    def _take(self, chunk: bytes) -> None:
        self._rest += chunk
        while (at := self._rest.find(b"\n")) >= 0:
            line = bytes(self._rest[:at])
            del self._rest[: at + 1]
            self._heed(line)
        if len(self._rest) > rescue.MOST_LINE:
            self._rest.clear()

    def _heed(self, line: bytes) -> None:
        word = rescue.heard(self._id, line)
        if isinstance(word, AgentUpdateEnded):
            self._ended = word  # told when it has ended indeed
        elif isinstance(word, AgentUpdateProgress):
            phase, at = self._told
            now = self._loop.time()
            if word.phase != phase or now - at >= EVERY_S or word.percent == 100:
                self._told = (word.phase, now)
                self._send(word)
        elif word is not None:
            self._send(word)
