"""Who is connected now, in memory: each entry belongs to the one live channel of a node in the role agent,
or in the role beacon: then no release of the agent runs there, and the node is not 'connected'."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from instar.wire.messages import Message


class Channel(Protocol):
    """What can be sent through."""

    node: str
    digest: str
    since: float

    async def send(self, message: Message) -> bool:
        """False: it did not go out, and the channel has ended."""

    async def send_bulk(self, frame: str) -> bool:
        """The same for a large frame: it may take long, and must not be cancelled."""


class Live(Channel, Protocol):
    """A live channel, as the rest of the server sees it. `told`, `looked_at`, `tries`: the looks it was sent;
    `told_gone`: the modules that it was told are wanted no more. `modules` and `digests` are those of its last health.
    `forced`: it takes a release through its channel although it has it. `boot_id` is its hello's,
    `well` what its last health said (None: none came yet).
    `address` is where it came from, `wake_port` the TCP port that wakes it (0: none).
    """

    node: str
    version: str
    digest: str
    tx: str
    since: float
    heard: float
    told: int
    looked_at: float
    tries: int
    told_gone: frozenset[str]
    modules: dict[str, str]
    digests: dict[str, str]
    boot_id: str
    well: bool | None
    forced: bool
    address: str
    wake_port: int


class Presence:
    def __init__(self) -> None:
        self._live: dict[str, Live] = {}
        self._beacons: dict[str, Channel] = {}
        self._updaters: dict[str, str] = {}

    def join(self, live: Live) -> Live | None:
        """Take the node's place. The one whose place it takes, if there was one."""
        replaced = self._live.get(live.node)
        self._live[live.node] = live
        return replaced

    def leave(self, live: Live) -> bool:
        """False: it had been replaced before."""
        if self._live.get(live.node) is not live:
            return False
        del self._live[live.node]
        return True

    def get(self, node: str) -> Live | None:
        return self._live.get(node)

    def join_beacon(self, beacon: Channel) -> tuple[Channel | None, Live | None]:
        """Take the node's place as its beacon. The beacon and the agent that were there: of an agent whose
        launcher calls for help nothing is left but a connection that has not noticed."""
        before = self._beacons.get(beacon.node)
        self._beacons[beacon.node] = beacon
        return before, self._live.pop(beacon.node, None)

    def leave_beacon(self, beacon: Channel) -> bool:
        """False: it had been replaced before."""
        if self._beacons.get(beacon.node) is not beacon:
            return False
        del self._beacons[beacon.node]
        return True

    def beacon(self, node: str) -> Channel | None:
        return self._beacons.get(node)

    def beacons(self) -> Iterable[Channel]:
        return tuple(self._beacons.values())

    def channel(self, node: str) -> Channel | None:
        """Whatever there is to send something through."""
        return self._live.get(node) or self._beacons.get(node)

    def all(self) -> Iterable[Live]:
        return tuple(self._live.values())

    def count(self) -> int:
        return len(self._live)

    def updater_seen(self, node: str, digest: str) -> bool:
        """Note which updater asked last. True: it is another than before."""
        changed = self._updaters.get(node) != digest
        self._updaters[node] = digest
        return changed

    def updater(self, node: str) -> str | None:
        return self._updaters.get(node)
