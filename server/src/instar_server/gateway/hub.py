"""What a control channel needs of the place that holds all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from instar.wire.messages import Hello
from instar_server.services.delivery import Delivery
from instar_server.services.presence import Channel, Live
from instar_server.services.recoveries import Recovering
from instar_server.services.standing import Standing
from instar_server.services.transfers import Transfers
from instar_server.services.verdicts import Verdicts
from instar_server.storage.batch import Observations


@dataclass(frozen=True, slots=True)
class ChannelSettings:
    """Seconds: how often nodes ping and report health, and how long a test job may take."""

    ping_s: float = 30.0
    health_s: float = 60.0
    job_s: float = 30.0


class Hub(Protocol):
    settings: ChannelSettings
    standing: Standing
    verdicts: Verdicts
    delivery: Delivery
    transfers: Transfers
    recoveries: Recovering
    observations: Observations
    joined: Callable[[str], None]  # told the node's name once it has been welcomed
    now: Callable[[], float]

    async def join(self, live: Live, hello: Hello) -> None:
        """Take the node's place and tell what its hello said; the older channel, if there is one, is told and ended."""

    def healthy(self, live: Live) -> None:
        """Its health has come."""

    def leave(self, live: Live) -> None:
        """The channel has ended. One that had been replaced before changes nothing."""

    def join_beacon(self, beacon: Channel) -> None:
        """As `join`, for a node's launcher: of its agent nothing runs."""

    def leave_beacon(self, beacon: Channel) -> None:
        """As `leave`, for a beacon."""
