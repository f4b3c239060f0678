"""The resident agent: what the channel's messages and the local API's requests set going."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sys
from typing import Any

from instar.agent.channel import Channel
from instar.agent.jobs import Jobs
from instar.agent.node import Node, trial_tx
from instar.agent.renew import Renewer
from instar.agent.wake import Waker
from instar.host.clock import Clock
from instar.host.layout import Layout
from instar.host.points import reach
from instar.host.program import Program
from instar.wire.messages import PROTOCOL, Health, Hello, Job

FEATURES = ["jobs"]

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
        features=FEATURES,
    )


class Resident:
    """The `Duties` of the channel, and the local API's commands. main sets `channel` and `jobs`."""

    channel: Channel
    jobs: Jobs

    def __init__(
        self, layout: Layout, program: Program, node: Node, clock: Clock, waker: Waker, renewer: Renewer
    ) -> None:
        self._layout, self._program, self._node, self._clock = layout, program, node, clock
        self._waker, self._renewer = waker, renewer
        self._started = clock.monotonic()
        self._hello = make_hello(program, node, clock, "agent", "")

    # --- what the channel asks

    def hello(self) -> Hello:
        """The trial's record is read anew: a trial may begin or end while we run."""
        tx = trial_tx(self._layout, self._program.release)
        return Hello(**{**_fields(self._hello), "tx": tx})

    def health(self) -> Health:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        facts: dict[str, Any] = {
            "uptime_s": round(self._uptime_s(), 1),
            "jobs_held": self.jobs.held,
            "peak_rss": usage.ru_maxrss * 1024,
            "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        }
        return Health(ok=True, modules={}, facts=facts)

    def welcomed(self) -> None:
        reach("agent:welcomed")
        self.jobs.resend()

    def look(self, reason: str) -> None:
        log.info("the server says look: %s", ascii(reason)[:100])
        self._waker.wake()

    def job(self, job: Job) -> None:
        self.jobs.take(job)

    def acknowledged(self, job_id: str) -> None:
        self.jobs.acknowledged(job_id)

    # --- what the local API asks

    def answer_health(self, _request: dict[str, Any]) -> dict[str, Any]:
        """What the updater needs to judge this release."""
        since_s = self.channel.connected_for_s
        return {
            "version": self._program.version,
            "digest": self._program.digest,
            "pid": os.getpid(),
            "release": self._program.release,
            "connected": since_s is not None,
            "connected_for_s": round(since_s or 0.0, 3),
            "modules": {},
            "uptime_s": round(self._uptime_s(), 3),
            "boot_id": self._clock.boot_id(),
        }

    def answer_status(self, request: dict[str, Any]) -> dict[str, Any]:
        held = self._renewer.validity()
        return {
            **self.answer_health(request),
            "role": "agent",
            "node": self._node.id,
            "server": str(self._node.server),
            "proxy": str(self._node.proxy) if self._node.proxy else "",
            "jobs_held": self.jobs.held,
            "certificate_until": held.not_after if held else None,
            "program": str(self._program.path),
        }

    def answer_look(self, _request: dict[str, Any]) -> dict[str, Any]:
        self.channel.hurry()
        self._waker.wake()
        return {}

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
