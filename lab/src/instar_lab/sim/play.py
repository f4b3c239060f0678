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


async def play(server: str, ca: Path, token: str, agents: int, seconds: float) -> int:
    """Enrol, connect, stay for `seconds` (0: until cancelled)."""
    url = urlsplit(server)
    if url.scheme != "https" or not url.hostname or not url.port:
        raise InputError("bad-server", f"cannot connect: expected https://host:port, got {server!r}")
    if not ca.is_file():
        raise InputError("no-ca", f"cannot connect: expected the fleet's CA certificate, got {ca}")
    with tempfile.TemporaryDirectory(prefix="instar-sim-") as folder:
        identities = await enrol(server, ca, token, agents, Path(folder))
        print(f"enrolled {len(identities)} agents", flush=True)
        async with Swarm(identities, url.hostname, url.port) as swarm:
            took = await swarm.wait_connected(agents, CONNECT_S)
            print(f"connected {agents} agents in {took:.1f} s", flush=True)
            end = time.monotonic() + seconds if seconds else None
            while end is None or time.monotonic() < end:
                await asyncio.sleep(TELL_S if end is None else min(TELL_S, max(0.0, end - time.monotonic())))
                print(f"{swarm.connected} of {agents} connected; {swarm.troubles()}", flush=True)
    return 0
