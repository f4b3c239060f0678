"""The resident agent: what the channel's messages and the local API's requests set going."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from instar.agent.channel import Channel
from instar.agent.jobs import Jobs
from instar.agent.late import Late
from instar.agent.node import Node, trial_tx
from instar.agent.poke import Poke
from instar.agent.renew import Renewer
from instar.agent.wake import Waker
from instar.core.errors import InputError
from instar.core.modules import check_name
from instar.host.clock import Clock
from instar.host.layout import LINES, Layout
from instar.host.points import reach
from instar.host.program import Program
from instar.version import BUILT
from instar.wire.messages import (
    NATIVE_FORCE,
    PROTOCOL,
    AgentUpdate,
    Command,
    Health,
    Hello,
    Job,
    Message,
    UpdateBlock,
    UpdateEnd,
    UpdateOffer,
)

if TYPE_CHECKING:
    from instar.agent.check import Checks
    from instar.agent.commands import Commands
    from instar.agent.local_api import Handler
    from instar.agent.native import Native
    from instar.agent.recovery import Recovery
    from instar.agent.supervisor import Supervisor

FEATURES = ["jobs", "modules", "commands", "native", "recovery"]
HEALTH_EVERY_S = 0.2  # least time between two that changes of modules cause
WITHIN_S = 30.0  # for a restart that names no bound

log = logging.getLogger("instar.agent")


def make_hello(program: Program, node: Node, clock: Clock, role: str, tx: str) -> Hello:
    return Hello(
        v=PROTOCOL,
        role=role,
        node=node.id,
        version=program.version,
        digest=program.digest,
        boot_id=clock.boot_id(),
        pid=os.getpid(),
        started=round(clock.wall(), 3),
        tx=tx,
        os=os.uname().sysname.lower(),
        arch=os.uname().machine,
        python=".".join(map(str, sys.version_info[:3])),
        features=[*FEATURES, NATIVE_FORCE] if node.forced else FEATURES,
        built=BUILT,
    )


class Resident:
    """The `Duties` of the channel, what is `Around` the commands, and the local API's handlers.

    main sets the parts below.
    """

    channel: Channel
    jobs: Jobs
    poke: Poke
    modules: Late[Supervisor]
    commands: Late[Commands]
    native: Late[Native]
    recovery: Late[Recovery]
    checks: Callable[[], Checks]  # made when first asked for

    def __init__(
        self, layout: Layout, program: Program, node: Node, clock: Clock, waker: Waker, renewer: Renewer
    ) -> None:
        self._layout, self._program, self._node, self._clock = layout, program, node, clock
        self._waker, self._renewer = waker, renewer
        self._started = clock.monotonic()
        self._hello = make_hello(program, node, clock, "agent", "")
        self._told_at, self._telling = -HEALTH_EVERY_S, False
        self.stop = asyncio.Event()  # set: end this process
        self.again = False  # and become the launcher then

    # --- what the channel asks

    def hello(self) -> Hello:
        """The trial's record is read anew: a trial may begin or end while we run."""
        tx = trial_tx(self._layout, self._program.release)
        return Hello(**{**_fields(self._hello), "tx": tx, "wake_port": self.poke.port})

    def health(self) -> Health:
        usage, modules = resource.getrusage(resource.RUSAGE_SELF), self.modules.made
        facts: dict[str, Any] = {
            "uptime_s": round(self._uptime_s(), 1),
            "jobs_held": self.jobs.held,
            "peak_rss": usage.ru_maxrss * 1024,
            "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        }
        states, digests = (modules.states(), modules.digests()) if modules else ({}, {})
        return Health(ok=True, modules=states, facts=facts, digests=digests)

    def welcomed(self) -> None:
        reach("agent:welcomed")
        with contextlib.suppress(OSError):
            os.unlink(self._layout.starts)  # the launcher counts the starts without a welcome
        self.jobs.resend()
        if self.commands.made is not None:
            self.commands.made.resend()
        if self.native.made is not None:
            self.native.made.connected()

    def look(self, reason: str) -> None:
        log.info("the server says look: %s", ascii(reason)[:100])
        self._waker.wake()

    def job(self, job: Job) -> None:
        self.jobs.take(job)

    def cancel(self, job_id: str) -> None:
        self.jobs.cancel(job_id)

    def command(self, command: Command) -> None:
        self.commands.need().take(command)

    def update(self, message: UpdateOffer | UpdateBlock | UpdateEnd) -> None:
        self.native.need().take(message)

    def recover(self, order: AgentUpdate, pin: str) -> None:
        self.recovery.need().take(order, pin)

    def acknowledged(self, item_id: str) -> None:
        """The id is a job's or a command's."""
        self.jobs.acknowledged(item_id)
        if self.commands.made is not None:
            self.commands.made.acknowledged(item_id)

    # --- what its parts ask

    def received(self, line: str) -> None:
        """A whole parcel is here. A recovery core is kept until it is needed."""
        if line in LINES:
            self._waker.wake()

    def recovered(self) -> None:
        """A recovery core has ended; if it was killed, the updater goes on with what it has left."""
        self._waker.wake()

    def modules_changed(self) -> None:
        """Tell the server at once, but not each of many changes in a row."""
        if not self._telling:
            self._telling = True
            loop = asyncio.get_running_loop()
            loop.call_at(max(loop.time(), self._told_at + HEALTH_EVERY_S), self._tell_health)

    def _tell_health(self) -> None:
        self._telling, self._told_at = False, asyncio.get_running_loop().time()
        self.channel.send(self.health())

    def poked(self, _peer: str) -> None:
        """Phone home now."""
        self.channel.hurry()
        self.channel.poke()
        self._waker.wake()

    async def finish(self, within_s: float) -> None:
        await self.jobs.finish(within_s)

    async def cycle(self, command_id: str) -> str:
        from instar.agent.again import cycle

        state = str(self._layout.state)
        return await cycle(self._program.command("cycle", "agent", "--state", state, "--command", command_id))

    def leave(self) -> None:
        self.again = True
        self.stop.set()

    def send(self, message: Message) -> bool:
        return self.channel.send(message)

    # --- what the local API asks

    def handlers(self) -> dict[str, Handler]:
        return {
            "status": self.answer_status,
            "health": self.answer_health,
            "look": self.answer_look,
            "modules": self.answer_modules,
            "restart": self.answer_restart,
            "command": self.answer_command,
            "reload-module": self.answer_reload,
            "check-module": self.answer_check,
        }

    async def answer_health(self, _request: dict[str, Any], _uid: int) -> dict[str, Any]:
        """What the updater needs to judge this release, and those of modules."""
        since_s, modules = self.channel.connected_for_s, self.modules.made
        return {
            "version": self._program.version,
            "digest": self._program.digest,
            "pid": os.getpid(),
            "release": self._program.release,
            "connected": since_s is not None,
            "connected_for_s": round(since_s or 0.0, 3),
            "modules": modules.states() if modules else {},
            "digests": modules.digests() if modules else {},
            "pids": modules.pids() if modules else {},
            "uptime_s": round(self._uptime_s(), 3),
            "boot_id": self._clock.boot_id(),
        }

    async def answer_status(self, request: dict[str, Any], uid: int) -> dict[str, Any]:
        held = self._renewer.validity()
        return {
            **await self.answer_health(request, uid),
            "role": "agent",
            "node": self._node.id,
            "server": str(self._node.server),
            "proxy": str(self._node.proxy) if self._node.proxy else "",
            "jobs_held": self.jobs.held,
            "certificate_until": held.not_after if held else None,
            "program": str(self._program.path),
            "wake_port": self.poke.port,
        }

    async def answer_look(self, _request: dict[str, Any], _uid: int) -> dict[str, Any]:
        self.channel.hurry()
        self._waker.wake()
        return {}

    async def answer_modules(self, _request: dict[str, Any], _uid: int) -> dict[str, Any]:
        return {"modules": self.modules.made.describe() if self.modules.made else []}

    async def answer_reload(self, request: dict[str, Any], _uid: int) -> dict[str, Any]:
        name = request.get("module")
        await self.modules.need().reload(check_name(name if isinstance(name, str) else ""))
        return {}

    async def answer_check(self, request: dict[str, Any], _uid: int) -> dict[str, Any]:
        return await self.checks().answer(request)

    async def answer_restart(self, request: dict[str, Any], uid: int) -> dict[str, Any]:
        names, agent, within_s = (
            request.get("modules", []),
            request.get("agent", False),
            request.get("within_s"),
        )
        within_s = WITHIN_S if within_s is None else within_s
        if (
            not isinstance(names, list)
            or not all(isinstance(name, str) for name in names)
            or not isinstance(agent, bool)
            or not isinstance(within_s, (int, float))
            or isinstance(within_s, bool)
        ):
            text = "cannot restart: expected 'modules' a list of names, 'agent' true or false, 'within_s' seconds"
            raise InputError("bad-request", text)
        return {"id": self.commands.need().order(names, agent, float(within_s), f"local:{uid}")}

    async def answer_command(self, request: dict[str, Any], _uid: int) -> dict[str, Any]:
        return self.commands.need().status(str(request.get("id", "")))

    def _uptime_s(self) -> float:
        return self._clock.monotonic() - self._started


def _fields(hello: Hello) -> dict[str, Any]:
    return {name: getattr(hello, name) for name in Hello.__slots__}


async def first_to_end(tasks: list[asyncio.Task[None]], stop: asyncio.Event) -> None:
    """Wait for `stop`, or for a task's end, which is always a fault: its error is raised."""
    stopped = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopped}:
            task.result()  # raises what ended it
            if not stop.is_set():
                raise RuntimeError(f"task {task.get_name()} ended by itself")
    finally:
        stopped.cancel()
