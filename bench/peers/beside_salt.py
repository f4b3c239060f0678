"""Jobs and restarts of ours and of Salt's from one run, in turns, so that a noisy machine hurts both.

Theirs is a test.ping by Salt's own LocalClient, on the machine of its master; ours an echo module by the API over
HTTPS, with the reply stored on the server. One node, then ten; then restarts of the agent and of a minion with
jobs sent meanwhile. Ours is asked without a pause, theirs gets three jobs.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

from bench import jobs, orders
from bench.figures import Figure
from bench.peers.apart import PeerUnavailable
from bench.peers.salt import MINIONS, Salt
from instar_lab.fleet import Fleet
from instar_server.ctl.client import Client

PEER = "Salt test.ping (this run)"
MINION = "Salt minion (this run)"
MODULE = "bench.python"
TURNS = 20
MOST_OF_THEIRS = 100  # theirs takes longer; ours are as many
RESTARTS = 3


def measure(count: int, cache: Path) -> list[Figure]:
    """A peer that cannot be had is told of in one line; it is no error."""
    try:
        with Salt(cache) as peer, Fleet(MINIONS) as fleet:
            return in_turns(peer, fleet, min(count, MOST_OF_THEIRS))
    except PeerUnavailable as error:
        print(f"make bench: goes on without the peer: {error}", flush=True)
        return []


def in_turns(peer: Salt, fleet: Fleet, count: int) -> list[Figure]:
    node = jobs.ready(fleet)
    with Client(fleet.server.access) as api:
        one = both(peer, api, "one", {"nodes": [node.id]}, count)
        idle = peer.ask("idle")
        peer.ask("grow")
        ten = both(peer, api, "all", {"all": True}, count)
    gaps: list[float] = []
    theirs: list[dict[str, float]] = []
    lost = 0
    for _ in range(RESTARTS):
        gap, missing = jobs.gaps(fleet, node, MODULE, {"agent": True}, 1)
        gaps += gap
        lost += missing
        theirs.append(peer.ask("restart"))
    restart = {MINION: median(each["seconds"] for each in theirs)}
    note = f"lost: ours {lost}; theirs {sum(each['lost'] for each in theirs):g} of {3 * RESTARTS} jobs"
    print(f"Salt's minion holds {idle['minion'] / 2**20:.0f} MiB", flush=True)
    return [
        *figures("job on one node, by turns", *one),
        *figures(f"job on all of {MINIONS} nodes, by turns", *ten),
        Figure("agent restart until it answers, by turns", "s", tuple(gaps), 0.5, restart, note),
    ]


def both(
    peer: Salt, api: Client, word: str, select: dict[str, object], count: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of ours and of theirs, in turns of TURNS."""
    ours: list[float] = []
    theirs: list[float] = []
    orders.seconds(api, MODULE, select, jobs.WARM_UP)
    peer.ask(word)
    while len(theirs) < count:
        turn = min(TURNS, count - len(theirs))
        ours += [value * 1000 for value in orders.seconds(api, MODULE, select, turn)]
        theirs += [peer.ask(word)["seconds"] * 1000 for _ in range(turn)]
    return ours, theirs


def figures(name: str, ours: list[float], theirs: list[float]) -> list[Figure]:
    return [
        Figure(f"{name}, p50", "ms", tuple(ours), None, {PEER: median(theirs)}),
        Figure(f"{name}, p99", "ms", (orders.p99(ours),), None, {PEER: orders.p99(theirs)}),
    ]
