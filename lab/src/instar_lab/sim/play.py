"""`instar-lab sim`: keep simulated agents connected and tell how many are."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from instar.core.errors import InputError
from instar_lab.sim.identities import enrol
from instar_lab.sim.swarm import Swarm

CONNECT_S = 300.0
TELL_S = 5.0


def place_of(server: str) -> tuple[str, int]:
    """Host and port of "https://host:port". Raises InputError `bad-server`."""
    try:
        url = urlsplit(server)
        if url.scheme == "https" and url.hostname and url.port:
            return url.hostname, url.port
    except ValueError:  # brackets without an end, a port that is too large
        pass
    raise InputError("bad-server", f"cannot connect: expected https://host:port, got {server!r:.200}")


async def play(server: str, ca: Path, token: str, agents: int, seconds: float) -> int:
    """Enrol, connect, stay for `seconds` (0: until cancelled). Raises as `enrol` does, InputError `bad-server`."""
    host, port = place_of(server)
    with tempfile.TemporaryDirectory(prefix="instar-sim-") as folder:
        identities = await enrol(server, ca, token, agents, Path(folder))
        print(f"enrolled {len(identities)} agents", flush=True)
        async with Swarm(identities, host, port) as swarm:
            took = await swarm.wait_connected(agents, CONNECT_S)
            print(f"connected {agents} agents in {took:.1f} s", flush=True)
            end = time.monotonic() + seconds if seconds else None
            while end is None or time.monotonic() < end:
                await asyncio.sleep(TELL_S if end is None else min(TELL_S, max(0.0, end - time.monotonic())))
                print(f"{swarm.connected} of {agents} connected; {swarm.troubles()}", flush=True)
    return 0
