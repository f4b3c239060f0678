"""Figures of jobs and restarts: a real server, a real node, real modules; and one job for 200 simulated nodes."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from bench import orders
from bench.figures import Figure
from bench.nodes import wait_on
from bench.orders import Asking
from instar_lab import machine
from instar_lab.fleet import Fleet
from instar_lab.node import Node
from instar_lab.program import build
from instar_lab.server import LabServer
from instar_lab.sim.identities import enrol
from instar_lab.sim.swarm import Swarm
from instar_server.ctl.client import Client

WARM_UP = 20  # jobs before any that counts
COLD = 10
RESTARTS = 10
SIMULATED = 200
FAN_OUTS = 20
CONNECT_S = 60.0
RESTART_S = 45.0
BEFORE, AFTER = 5, 5  # jobs that must be done before and after each restart
PEERS = {"Salt test.ping": 88.0}
PEERS_P99 = {"Salt test.ping": 105.0}
PEERS_RESTART = {"Salt minion": 8.16}


def measure(jobs: int, restarts: int = RESTARTS) -> list[Figure]:
    """`jobs` round trips of each kind, then the restarts, then the fan-out on a server of its own."""
    with Fleet(1) as fleet:
        node = ready(fleet)
        figures = round_trips(fleet, node, jobs)
        figures += restart_figures(fleet, node, restarts)
    return [*figures, *fan_out()]


def ready(fleet: Fleet) -> Node:
    """Nodes are connected, modules are published, and the service runs on all. The first node."""
    program = build.build("1.0.0")
    fleet.server.publish(program)
    fleet.server.want("1.0.0", ("agent", "updater"), "default")
    orders.publish(fleet, "bench.python", "bench.native", "bench.service")
    fleet.server.want("1.0.0", ("module/bench.service",), "default")
    fleet.add_nodes(program, "[trial]\nhold_s = 1.0\n")
    for node in fleet.nodes:
        wait_on(fleet, node, "agent", program)
        machine.wait_for(partial(serves, fleet, node), "the service module to answer", 60.0, fleet.logs)
    return fleet.nodes[0]


def serves(fleet: Fleet, node: Node) -> bool:
    body = {"module": "bench.service", "select": {"nodes": [node.id]}, "wait_s": 5.0}
    (row,) = fleet.server.api.post("/jobs", body)["rows"]
    return bool(row["state"] == "done")


# --- one node


def round_trips(fleet: Fleet, node: Node, jobs: int) -> list[Figure]:
    """Server → node → runner → server, as the server's database has it, which is what the aims are for; and
    around it the whole API call, with its answer that has the node's reply in it."""
    select = {"nodes": [node.id]}
    figures = []
    with Client(fleet.server.access) as api:
        first = first_time(fleet, api, node)
        for module, words, aim, worst in (
            ("bench.python", "job, Python, warm", 8.0, 20.0),
            ("bench.native", "job, native, warm", 6.0, None),
            ("bench.service", "question to a service module", None, None),
        ):
            orders.seconds(api, module, select, WARM_UP)
            times = [(whole * 1000, way * 1000) for whole, way in orders.both(api, module, select, jobs)]
            way = tuple(way for _, way in times)
            figures.append(Figure(f"{words}, p50", "ms", way, aim, note=WAY_NOTE))
            figures.append(Figure(f"{words}, p99", "ms", (orders.p99(list(way)),), worst, note=WAY_NOTE))
            call = tuple(whole for whole, _ in times)
            figures.append(Figure(f"{words}, API call, p50", "ms", call, None, PEERS, CALL_NOTE))
            p99 = orders.p99(list(call))
            figures.append(Figure(f"{words}, API call, p99", "ms", (p99,), None, PEERS_P99, CALL_NOTE))
        figures.append(Figure("job, Python, cold", "ms", cold(api, node), None, PEERS, COLD_NOTE))
    return [*figures, first]


WAY_NOTE = "server → node → runner → server: the stored job's sent_at to ended_at"
CALL_NOTE = "POST /jobs with wait_s to its answer"
COLD_NOTE = "the fork server is killed before each"


def cold(api: Client, node: Node) -> tuple[float, ...]:
    """Milliseconds of jobs that find no fork server, and so wait for the start of an interpreter."""
    taken = []
    for n in range(COLD):
        for seen in machine.naming(node.state):
            if seen.words[-2:] == ("runner", "--warm"):
                machine.signal_process(seen, signal.SIGKILL)
                machine.wait_gone(seen.pid, 5.0)
        machine.pause(0.2)  # it is known to be gone before the job comes
        began = time.perf_counter()
        orders.job(api, "bench.python", {"nodes": [node.id]}, n)
        taken.append((time.perf_counter() - began) * 1000)
    return tuple(taken)


def first_time(fleet: Fleet, api: Client, node: Node) -> Figure:
    """Each of the two modules for the first time: metadata verified, fetched, unpacked, run."""
    taken = []
    for module in ("bench.python", "bench.native"):
        began = time.perf_counter()
        orders.job(api, module, {"nodes": [node.id]})
        taken.append(time.perf_counter() - began)
    return Figure("job with a module that the node did not have", "s", tuple(taken))


# --- restarts


def restart_figures(fleet: Fleet, node: Node, restarts: int) -> list[Figure]:
    """How long no answer came while jobs were ordered without a pause, and what was lost."""
    module, lost_service = gaps(fleet, node, "bench.service", {"modules": ["bench.service"]}, restarts)
    agent, lost = gaps(fleet, node, "bench.python", {"agent": True}, restarts)
    return [
        Figure("restart of one module until it answers", "s", tuple(module), 0.5),
        Figure("restart of the agent until a job is answered", "s", tuple(agent), 0.5, PEERS_RESTART),
        Figure(
            "jobs lost in these restarts", "jobs", (float(lost + lost_service),), 0.5, {"Salt minion": 1.0}
        ),
    ]


def gaps(
    fleet: Fleet, node: Node, module: str, restart: dict[str, Any], restarts: int
) -> tuple[list[float], int]:
    """Seconds between the last answer before and the first one after each restart; how many jobs were not done."""
    found = []
    with Asking(fleet.server, module, node.id) as asking:
        for _ in range(restarts):
            asking.wait_for(BEFORE)
            began = time.perf_counter()
            restarted(fleet, node, restart)
            asking.wait_for(AFTER)
            found.append(asking.longest_gap(began))
    return found, len(asking.lost)


def restarted(fleet: Fleet, node: Node, restart: dict[str, Any]) -> None:
    """Order the restart and wait for the node's own word that it went well."""
    body = {"select": {"nodes": [node.id]}, "wait_s": RESTART_S, **restart}
    order = fleet.server.api.post("/restarts", body)

    def over() -> dict[str, Any] | None:
        (row,) = fleet.server.api.get(f"/jobs/{order['id']}")["rows"]
        return None if row["state"] in ("queued", "sent", "taken", "running") else dict(row)

    row = machine.wait_for(over, "the restart to end", RESTART_S, fleet.logs)
    assert row["state"] == "done", (
        f"cannot measure: the restart ended as {row['state']}: {row['code']} {row['text']}"
    )


# --- many simulated nodes


def fan_out(agents: int = SIMULATED, rounds: int = FAN_OUTS) -> list[Figure]:
    """One job for all simulated nodes, from the API call to the answer with every node's reply."""
    with tempfile.TemporaryDirectory(prefix="instar-bench-") as name:
        server = LabServer(Path(name) / "server")
        try:
            server.create()
            server.start()
            server.publish_module(orders.MODULES / "bench.python")
            taken = uvloop.run(_fan_out(server, agents, rounds, Path(name) / "identities"))
        finally:
            server.close()
    values = tuple(value * 1000 for value in taken)
    return [Figure(f"one job on {agents} simulated nodes", "ms", values, note="all answers in")]


async def _fan_out(server: LabServer, agents: int, rounds: int, folder: Path) -> list[float]:
    host, port = server.gateway()
    identities = await enrol(f"https://{host}:{port}", server.ca, server.token(agents), agents, folder)
    async with Swarm(identities, host, port) as swarm:
        await swarm.wait_connected(agents, CONNECT_S)
        with Client(server.access) as api:
            await asyncio.to_thread(orders.job, api, "bench.python", {"all": True})
            taken = []
            for n in range(rounds):
                began = time.perf_counter()
                await asyncio.to_thread(orders.job, api, "bench.python", {"all": True}, n)
                taken.append(time.perf_counter() - began)
            return taken
