"""Figures of the server under thousands of simulated agents."""

from __future__ import annotations

import asyncio
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import uvloop

from bench.figures import Figure
from instar_lab import machine
from instar_lab.server import LabServer
from instar_lab.sim.identities import Identity, enrol
from instar_lab.sim.swarm import Swarm

WARM = 50  # agents that connect before memory is counted from
SETTLE_S = 5.0
CONNECT_S = 90.0
PING_ROUNDS = 50
KIB = 1024


@dataclass(slots=True)
class ServerBench:
    server: LabServer
    agents: int

    async def run(self, folder: Path) -> list[Figure]:
        fresh = self.rss()
        began, cpu = time.monotonic(), self.cpu()
        identities = await self.enrol(folder)
        enrolled = Figure("CPU per enrolment", "ms", ((self.cpu() - cpu) / self.agents * 1000,))
        print(f"enrolled {self.agents} simulated agents in {time.monotonic() - began:.0f} s", flush=True)
        host, port = self.server.gateway()
        async with Swarm(identities[:WARM], host, port, seed=1) as warm:
            await warm.wait_connected(WARM, CONNECT_S)
            await asyncio.sleep(SETTLE_S)
            base, cpu = self.rss(), self.cpu()
            async with Swarm(identities[WARM:], host, port, seed=2) as swarm:
                count = len(swarm.agents)
                seconds = await swarm.wait_connected(count, CONNECT_S)
                connect_cpu = (self.cpu() - cpu) / count
                await asyncio.sleep(SETTLE_S)
                memory = (self.rss() - base) / count
                messages = [await self.messages(swarm) for _ in range(3)]
                back = await self.restart(warm, swarm)
        return [
            Figure(
                "server memory per idle connection", "KiB RSS", (memory / KIB,), 60.0, {"MeshCentral": 550.0}
            ),
            Figure("server memory at start", "MiB RSS", (fresh / KIB / KIB,), 90.0, {"MeshCentral": 120.0}),
            Figure("CPU per connect", "ms", (connect_cpu * 1000,), note=f"{count / seconds:.0f} connects/s"),
            Figure("CPU per message", "µs", tuple(cpu * 1e6 for cpu in messages)),
            enrolled,
            Figure(f"{self.agents:,} agents back after a restart", "s", (back,), 15.0),
        ]

    async def enrol(self, folder: Path) -> list[Identity]:
        token = self.server.token(self.agents)
        host, port = self.server.gateway()
        return await enrol(f"https://{host}:{port}", self.server.ca, token, self.agents, folder)

    async def messages(self, swarm: Swarm) -> float:
        """CPU seconds of the server per round trip."""
        cpu = self.cpu()
        trips, _ = await swarm.ping_all(PING_ROUNDS, 60.0)
        return (self.cpu() - cpu) / trips

    async def restart(self, *swarms: Swarm) -> float:
        """Seconds from the server's end until every agent has been welcomed again."""
        await asyncio.to_thread(self.server.stop)
        began = time.monotonic()
        await asyncio.to_thread(self.server.start)
        await asyncio.gather(*(swarm.wait_connected(len(swarm.agents), CONNECT_S) for swarm in swarms))
        return time.monotonic() - began

    def rss(self) -> int:
        return machine.rss(self.server.pid)

    def cpu(self) -> float:
        return machine.cpu_seconds(self.server.pid)


def measure(agents: int) -> list[Figure]:
    """A server of its own, in a temporary folder."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="instar-bench-") as name:
        server = LabServer(Path(name) / "server")
        try:
            server.create()
            server.start()
            bench = ServerBench(server, agents)
            return uvloop.run(bench.run(Path(name) / "identities"))
        finally:
            server.close()
