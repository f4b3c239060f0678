"""What a target works with, handed in by the updater's main: nothing here is made by a target itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from instar.core.journal import Reason
from instar.core.settings import Settings
from instar.engine.fetch import Source
from instar.host.clock import Clock
from instar.host.files import DISK, Disk
from instar.host.layout import Layout
from instar.host.program import Program
from instar.host.services import Services


@dataclass(frozen=True, slots=True)
class TrustedTarget:
    """What the signed metadata says of a target. `path` is where the server serves it."""

    path: str
    length: int
    sha256: str
    custom: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The server's word: pass, fail or wait."""

    verdict: str
    reason: Reason


class Server(Protocol):
    """What a target asks of the server. Raises ServerUnreachable, ServerRefused or TrustError."""

    def trusted_target(self, target: str, metadata: Path | None = None) -> TrustedTarget:
        """Bring the metadata up to date, verify it, and look `target` up in it. `metadata` is a folder of
        them that takes the server's place: a parcel's."""

    def verdict(self, line: str, phase: str, tx: str, digest: str, wait_s: float) -> Verdict: ...

    def source(self) -> Source: ...

    def elsewhere(self, url: str) -> tuple[Source, str]:
        """What fetches from an https URL that is not the server's, and the path to ask it for. For system
        images only: what they are is signed, wherever they come from. Raises MachineError."""


def _untold(done: int, total: int) -> None:
    return


@dataclass(frozen=True, slots=True)
class Kit:
    """`brought` is told how many bytes of how many have come, while something is fetched."""

    layout: Layout
    clock: Clock
    services: Services
    server: Server
    settings: Settings
    program: Program
    sleep: Callable[[float], None]
    disk: Disk = field(default=DISK)
    brought: Callable[[int, int], None] = field(default=_untold)
