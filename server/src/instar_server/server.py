"""One server in one process: everything wired together, started, and ended in order.

Programs use `Server(layout, settings)` with `start()`, `stop()`; `main` adds signals.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import time

from instar_server.bus.local import LocalBus
from instar_server.ca import SERVER_DAYS, FleetCA, expiry
from instar_server.domain.looks import LookRules
from instar_server.domain.orders import Rules
from instar_server.gateway.artifacts import Artifacts
from instar_server.gateway.channels import Channels
from instar_server.gateway.hub import ChannelSettings
from instar_server.gateway.listener import Gateway, tls_context
from instar_server.gateway.nodes import NodeCalls
from instar_server.services.access import Access
from instar_server.services.bundles import Bundles
from instar_server.services.delivery import Delivery
from instar_server.services.enrolment import Enrolment
from instar_server.services.fleet import Fleet
from instar_server.services.history import History
from instar_server.services.operators import Operators
from instar_server.services.orders import Orders
from instar_server.services.parcels import Parcels
from instar_server.services.ports import Chance, Modules, Now, Recoveries, Releases, moment
from instar_server.services.presence import Presence
from instar_server.services.programs import Programs
from instar_server.services.progress import Board
from instar_server.services.recoveries import Parts, Recovering
from instar_server.services.scheduler import Scheduler
from instar_server.services.sending import Terms, Tools
from instar_server.services.standing import Standing
from instar_server.services.systems import Systems
from instar_server.services.transfers import Transfers
from instar_server.services.verdicts import Verdicts
from instar_server.services.wishes import Wishes
from instar_server.settings import Layout, Settings
from instar_server.storage.batch import Observations
from instar_server.storage.database import Database
from instar_server.storage.migrate import upgrade
from instar_server.trust.files import make_folder, write_atomic
from instar_server.trust.keys import load_online
from instar_server.trust.repository import Repository
from instar_server.web.app import make_app
from instar_server.web.listener import WebListener
from instar_server.web.services import WebServices

log = logging.getLogger(__name__)

REFRESH_EVERY_S = 600.0
RENEW_BEFORE_S = SERVER_DAYS * 86400 / 3  # of the server's own certificate


class Server:
    """`start` listens and returns; `gateway_port` and `api_port` are then the real ones. `stop` is bounded."""

    def __init__(
        self, layout: Layout, settings: Settings, now: Now = time.time, chance: Chance = secrets.token_hex
    ) -> None:
        self.layout, self.settings = layout, settings
        self._now, self._chance = now, chance
        self.gateway_port = self.api_port = self.artifacts_port = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Migrate, open, listen. Raises InstarError when something needed is not there."""
        layout, settings, now = self.layout, self.settings, self._now
        await asyncio.to_thread(upgrade, layout.database)
        self._ca = FleetCA.load(layout.ca)
        renew_server_certificate(layout, settings, self._ca, now())
        self._tls = tls_context(layout.certificate, self._ca.pem)
        self.repository = Repository.open(layout.trust, load_online(layout.online), moment(now()))
        self.repository.blobs.sweep()
        self._database = Database(layout.database)
        self._wire()
        try:
            await self._listen()
        except BaseException:
            await self._gateway.stop(0.5)
            if self._second is not None:
                await self._second.stop(0.5)
            await self._close()
            raise

    async def _listen(self) -> None:
        settings = self.settings
        await self._standing.warm()
        await self._systems.warm()
        self.gateway_port = await self._gateway.start(settings.bind, settings.gateway_port, self._tls)
        host = url_host(settings.hosts[0])
        self._programs.server = settings.public_gateway or f"https://{host}:{self.gateway_port}"
        if self._second is not None:
            self.artifacts_port = await self._second.start(settings.bind, settings.artifacts_port, self._tls)
            place = settings.public_artifacts or f"https://{host}:{self.artifacts_port}"
            self._artifacts.place = self._calls.artifacts = place
        self.api_port = await self._web.start(settings.bind, settings.api_port)
        work = [
            self._observations.run(), self._channels.sweep(), self._gateway.tend(), self._scheduler.run(),
            self._delivery.run(), self._recovering.run(), self._systems.run(),
        ]  # fmt: skip
        if self._second is not None:
            work.append(self._second.tend())
        self._tasks = [asyncio.create_task(each) for each in work]
        make_folder(self.layout.ports.parent)
        write_atomic(self.layout.ports, json.dumps(self.ports()).encode())

    async def _close(self) -> None:
        await self._database.close()
        self.repository.close()

    def ports(self) -> dict[str, object]:
        """What run/ports.json holds: where to find this server."""
        host = url_host(self.settings.hosts[0])
        scheme = "http" if self.settings.insecure_http else "https"
        return {
            "pid": os.getpid(),
            "gateway_port": self.gateway_port,
            "api_port": self.api_port,
            "artifacts_port": self.artifacts_port,
            "gateway": f"https://{host}:{self.gateway_port}",
            "api": f"{scheme}://{host}:{self.api_port}",
        }

    def _wire(self) -> None:
        database, now, chance = self._database, self._now, self._chance
        bus, presence = LocalBus(), Presence()
        releases, modules = Releases(self.repository), Modules(self.repository)
        settings = self.settings
        self._observations = Observations(database)
        self._standing = Standing(database, bus, now)
        self._verdicts = Verdicts(database, bus, releases, presence, now, chance)
        limits = Rules(settings.job_resend_s, max(300.0, settings.job_resend_s), settings.job_silence_s)
        self._delivery = Delivery(database, bus, presence, now, limits)
        self._orders = Orders(database, bus, presence, modules, self._delivery, now, chance, limits)
        history, wishes = History(database, bus, now), Wishes(database, bus, releases, modules, now)
        enrolment = Enrolment(
            database, bus, self._ca, settings.certificate_days * 86400, now, chance, settings.wrong_tokens
        )
        board = Board(bus, now)
        parcels = self._parcels = Parcels(self.repository, self.layout.parcels)
        cores, fleet = Recoveries(self.repository), Fleet(database, presence, self._observations)
        terms = Terms(settings.native_block, settings.native_window, settings.native_rate)
        transfers = Transfers(Tools(parcels, presence, board, terms, now, chance), history, bus)
        parts = Parts(
            parcels, transfers, presence, releases, cores, wishes, fleet, history, board, bus, database
        )  # fmt: skip
        recovering = Recovering(parts, settings.beacon_recovery, now, chance)
        self._standing.recovered = recovering.is_open
        self._transfers, self._recovering = transfers, recovering
        bundles = Bundles(self.repository)
        self._systems = Systems(database, bus, bundles, self._observations, now, chance)
        self._scheduler = Scheduler(
            database, bus, presence, now,
            LookRules(floor_s=settings.look_floor_s, cap_s=max(600.0, settings.look_floor_s)),
            (transfers.wanted, recovering.wanted), transfers.in_trouble,
            chores=((REFRESH_EVERY_S, self._refresh), (86400.0, self._renew)),
        )  # fmt: skip
        self._channels = Channels(
            ChannelSettings(settings.ping_s, settings.health_s, settings.job_s),
            self._standing, self._verdicts, self._delivery, transfers, recovering, presence,
            self._observations, bus, self._joined, now,
        )  # fmt: skip
        self._wire_gateway(enrolment, wishes, history, presence)
        self._programs = Programs(self.repository, releases, wishes, self._ca.pem)
        services = WebServices(
            Access(database, now, chance), fleet, enrolment, wishes, history, self._standing, releases, modules,
            self._orders, self.repository, self._programs, bus, presence, database, settings.max_upload, now,
            cores, parcels, board, recovering, Operators(self._ca, bus, now), bundles, self._systems,
        )  # fmt: skip
        certificate = None if settings.insecure_http else self.layout.certificate
        self._web = WebListener(make_app(services), certificate)

    def _wire_gateway(
        self, enrolment: Enrolment, wishes: Wishes, history: History, presence: Presence
    ) -> None:
        self._calls = calls = NodeCalls(
            enrolment, wishes, self._systems, self._verdicts, history, presence, self._observations,
            self.settings.poll_s, self._now, self._troubled,
        )  # fmt: skip
        self._artifacts = Artifacts(self.repository, self._recovering.serves)
        routes = [*calls.routes(), *self._artifacts.routes(), *self._channels.routes()]
        self._gateway = Gateway(self._standing, routes, self._channels, self._now)
        self._second: Gateway | None = None
        if self.settings.artifacts_port >= 0:
            self._second = Gateway(self._standing, Artifacts(self.repository).routes(), None, self._now)

    def _joined(self, node: str) -> None:
        """An agent has been welcomed."""
        self._transfers.joined(node)
        self._recovering.joined(node)
        self._scheduler.joined(node)
        self._systems.joined(node)

    def _troubled(self, node: str) -> None:
        """A node cannot reach the artifacts."""
        self._transfers.trouble(node)
        self._scheduler.joined(node)

    async def _refresh(self) -> None:
        """Sign the online metadata anew before it expires."""
        await asyncio.to_thread(self.repository.refresh, moment(self._now()))

    async def _renew(self) -> None:
        """Renew the server's own certificate in time; new connections get the new one."""
        if renew_server_certificate(self.layout, self.settings, self._ca, self._now()):
            self._tls.load_cert_chain(self.layout.certificate)
            self._web.reload(self.layout.certificate)

    async def stop(self) -> None:
        """Accept nothing more, tell every node, answer who waits, write what is pending, close."""
        within_s = self.settings.stop_within_s
        self._gateway.stop_accepting()
        ports = [self._gateway.stop(within_s / 2), self._web.stop(within_s / 2)]
        if self._second is not None:
            self._second.stop_accepting()
            ports.append(self._second.stop(within_s / 2))
        self._verdicts.close()
        self._orders.close()
        await self._transfers.close()
        await self._parcels.close()
        try:
            async with asyncio.timeout(within_s):
                await asyncio.gather(*ports)
        except TimeoutError:
            log.warning("not every connection ended within %g s", within_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._recovering.close()
        await self._systems.close()
        await self._observations.close()
        await self._delivery.close()
        await self._close()
        self.layout.ports.unlink(missing_ok=True)

    async def broken(self) -> None:
        """Return only when a part of the server has ended by itself, which it never should."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not task.cancelled() and task.exception() is not None:
                log.error("a part of the server failed", exc_info=task.exception())


def renew_server_certificate(layout: Layout, settings: Settings, ca: FleetCA, now: float) -> bool:
    """Issue the server's certificate where it is absent or in its last third. True when it did."""
    path, hosts = layout.certificate, layout.certificate.with_name("hosts.json")
    wanted = json.dumps(settings.hosts).encode()
    same_hosts = hosts.exists() and hosts.read_bytes() == wanted
    if same_hosts and path.exists() and expiry(path.read_bytes()) - now > RENEW_BEFORE_S:
        return False
    certificate, key = ca.issue_server(settings.hosts, now)
    make_folder(path.parent)
    # One file for both, so that a cut between two writes never leaves a key that does not fit.
    write_atomic(path, key + certificate.encode(), 0o600)
    write_atomic(hosts, wanted)
    return True


def url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
