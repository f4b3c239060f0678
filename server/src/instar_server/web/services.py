"""What the API works with: handed in once, reached by every call through its request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from instar_server.bus.api import Bus
from instar_server.services.access import Access
from instar_server.services.bundles import Bundles
from instar_server.services.enrolment import Enrolment
from instar_server.services.fleet import Fleet
from instar_server.services.history import History
from instar_server.services.operators import Operators
from instar_server.services.orders import Orders
from instar_server.services.parcels import Parcels
from instar_server.services.ports import Modules, Recoveries, Releases
from instar_server.services.presence import Presence
from instar_server.services.programs import Programs
from instar_server.services.progress import Board
from instar_server.services.recoveries import Recovering
from instar_server.services.standing import Standing
from instar_server.services.systems import Systems
from instar_server.services.wishes import Wishes
from instar_server.storage.database import Database
from instar_server.trust.repository import Repository


@dataclass(frozen=True, slots=True)
class WebServices:
    """`max_upload` in bytes."""

    access: Access
    fleet: Fleet
    enrolment: Enrolment
    wishes: Wishes
    history: History
    standing: Standing
    releases: Releases
    modules: Modules
    orders: Orders
    repository: Repository
    programs: Programs
    bus: Bus
    presence: Presence
    database: Database
    max_upload: int
    now: Callable[[], float]
    cores: Recoveries
    parcels: Parcels
    board: Board
    recovering: Recovering
    operators: Operators
    bundles: Bundles
    systems: Systems
