"""The plain calls of a node: enrol, renew, wanted, verdict, events, system."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from aiohttp import web

from instar.core.errors import InputError
from instar_server.domain import wanted
from instar_server.gateway.answers import json_answer, read_body
from instar_server.gateway.identity import peer, program
from instar_server.services.enrolment import Enrolment
from instar_server.services.history import History, NodeEvent
from instar_server.services.presence import Presence
from instar_server.services.system_reports import MAX_REPORT, SystemReport
from instar_server.services.systems import Systems
from instar_server.services.verdicts import Verdicts
from instar_server.services.wishes import Wishes
from instar_server.storage.batch import SEEN, UPDATER, Observations

MAX_ENROL = 65_536  # bytes of a body
MAX_EVENTS = 4_194_304
TROUBLE = "artifacts-unreachable"

V1 = Annotated[int, msgspec.Meta(ge=1, le=1)]


class EnrolBody(msgspec.Struct):
    v: V1
    token: Annotated[str, msgspec.Meta(max_length=200)]
    csr: str
    facts: dict[str, Any] = {}


class RenewBody(msgspec.Struct):
    v: V1
    csr: str


class EventsBody(msgspec.Struct):
    v: V1
    events: list[NodeEvent]


class NodeCalls:
    def __init__(
        self,
        enrolment: Enrolment,
        wishes: Wishes,
        systems: Systems,
        verdicts: Verdicts,
        history: History,
        presence: Presence,
        observations: Observations,
        poll_s: float,
        now: Callable[[], float],
        troubled: Callable[[str], None],
    ) -> None:
        """`troubled` is told the node that says that it cannot reach the artifacts; `artifacts` is where those
        are, when they have a port of their own."""
        self._troubled, self.artifacts = troubled, ""
        self._enrolment, self._wishes, self._verdicts, self._history = enrolment, wishes, verdicts, history
        self._systems = systems
        self._presence, self._observations, self._poll_s, self._now = presence, observations, poll_s, now

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/enrol", self.enrol),
            web.post("/v1/renew", self.renew),
            web.get("/v1/node/wanted", self.wanted),
            web.get("/v1/node/verdict", self.verdict),
            web.post("/v1/node/events", self.events),
            web.post("/v1/node/system", self.system),
        ]

    async def enrol(self, request: web.Request) -> web.Response:
        body = await read_body(request, EnrolBody, MAX_ENROL)
        done = await self._enrolment.enrol(body.token, body.csr, body.facts, request.remote)
        answer = {
            "v": 1,
            "node": done.node,
            "certificate": done.certificate,
            "ca": done.ca,
            "group": done.group,
        }
        return json_answer(answer)

    async def renew(self, request: web.Request) -> web.Response:
        body = await read_body(request, RenewBody, MAX_ENROL)
        certificate = await self._enrolment.renew(peer(request).node, body.csr)
        return json_answer({"v": 1, "certificate": certificate})

    async def wanted(self, request: web.Request) -> web.Response:
        node = peer(request).node
        self._seen(request)
        if request.query.get("trouble") == TROUBLE:
            self._troubled(node)
        wishes = await self._wishes.of_node(node)
        system, cold_boot = await self._systems.wanted(node)
        return json_answer(wanted.as_wire(node, wishes, self._poll_s, self.artifacts, system, cold_boot))

    async def verdict(self, request: web.Request) -> web.Response:
        self._seen(request)
        query, asking = request.query, program(request)
        verdict = await self._verdicts.ask(
            peer(request).node,
            query.get("line", ""),
            query.get("phase", ""),
            query.get("tx", ""),
            query.get("digest", ""),
            (asking[0], asking[2]) if asking else None,
            _seconds(query.get("wait_s", "0")),
            query.get("boot_id", ""),
        )
        return json_answer(verdict.as_json())

    async def events(self, request: web.Request) -> web.Response:
        body = await read_body(request, EventsBody, MAX_EVENTS)
        self._seen(request)
        return json_answer({"v": 1, "stored": await self._history.store(peer(request).node, body.events)})

    async def system(self, request: web.Request) -> web.Response:
        body = await read_body(request, SystemReport, MAX_REPORT)
        self._systems.report(peer(request).node, body)
        self._seen(request)
        return json_answer({"v": 1})

    def _seen(self, request: web.Request) -> None:
        """Note that the node was here, and which updater it runs."""
        node, asking = peer(request).node, program(request)
        if asking is not None and asking[0] == "updater":
            self._presence.updater_seen(node, asking[2])
            self._observations.put(UPDATER, node, asking[1], asking[2], self._now())
        else:
            self._observations.put(SEEN, node, self._now())


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds <= 86400.0:
        raise InputError("bad-wait", f"cannot wait: expected wait_s in seconds, got {text[:40]!r}")
    return seconds
