"""Our figures and a peer's from one run: ours, theirs, ours, theirs, so that a noisy machine hurts both.

Theirs is MeshCentral's server with MeshAgents started by hand, and the server's own ("native") update.
- update gap: both by what the server sees; ours counts from the last answer of the old agent, theirs from the
  close of its connection, to the new agent's hello or verified connection.
- whole update: ours from the answer to `want` to `confirmed` less the hold time; theirs from the moment at which
  the server notices an agent's digest until the new one is back.
- memory: RSS; agent and server thirty seconds after the last update (our server's right after its start).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench import nodes
from bench.figures import Figure
from bench.peers.apart import PeerUnavailable
from bench.peers.meshcentral import MeshCentral
from instar_lab import machine
from instar_lab.fleet import Fleet
from instar_lab.program import build

LEAST = 5  # updates of each
AGENT = "MeshAgent (this run)"
SERVER = "MeshCentral (this run)"
NOTE = "theirs has no signature, self-test, fsync or way back"


@dataclass(slots=True)
class Beside:
    """`figures` are those measured in turns; `others` belongs to figures of ours, by their names."""

    figures: list[Figure] = field(default_factory=list)
    others: dict[str, dict[str, float]] = field(default_factory=dict)

    def added_to(self, figures: Sequence[Figure]) -> list[Figure]:
        """All figures, the peer's beside ours."""
        ours = [
            dataclasses.replace(figure, others=figure.others | self.others.get(figure.name, {}))
            for figure in figures
        ]
        return self.figures + ours


def measure(updates: int, cache: Path, idle_s: float = nodes.IDLE_S) -> Beside:
    """At least five updates of each. A peer that cannot be had is told of in one line; it is no error."""
    found = Beside()
    try:
        with MeshCentral(cache) as peer:
            found.figures = in_turns(peer, max(updates, LEAST))
            machine.pause(idle_s)
            rss = peer.ask("idle")
        found.others["idle agent"] = {AGENT: rss["agent"] / nodes.MIB}
        found.others["server memory at start"] = {SERVER: rss["server"] / nodes.MIB}
    except PeerUnavailable as error:
        print(f"make bench: goes on without the peer: {error}", flush=True)
    return found


def in_turns(peer: MeshCentral, updates: int) -> list[Figure]:
    """Update gap and whole update, ours and theirs by turns; raises PeerUnavailable."""
    gaps: list[float] = []
    wholes: list[float] = []
    theirs: list[dict[str, float]] = []
    with Fleet(1) as fleet:
        running = build.build("1.0.0")
        fleet.server.publish(running)
        fleet.server.want("1.0.0", ("agent", "updater"), "default")
        fleet.add_nodes(running, nodes.SETTINGS)
        node = fleet.nodes[0]
        nodes.wait_on(fleet, node, "agent", running)
        for number in range(1, updates + 1):
            target = build.build(f"1.0.{number}")
            gap, whole = nodes.update(fleet, node, running, target)
            gaps.append(gap * 1000)
            wholes.append(whole)
            running = target
            theirs.append(peer.ask("update"))
    gap_of_theirs = {AGENT: median(one["gap"] for one in theirs) * 1000}
    whole_of_theirs = {AGENT: median(one["whole"] for one in theirs)}
    return [
        Figure("update gap, by turns", "ms", tuple(gaps), None, gap_of_theirs),
        Figure("whole update, by turns", "s", tuple(wholes), None, whole_of_theirs, NOTE),
    ]
