"""Who is at the other end: read from the TLS certificate, checked against revocation on every request."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from instar.core.errors import InputError
from instar_server.domain import names
from instar_server.domain.errors import Forbidden, Unauthenticated
from instar_server.gateway.answers import Handler
from instar_server.services.standing import Lapsed, Peer, Standing

PEER = "instar.peer"
PROGRAM = "instar.program"
OPEN_PATHS = frozenset({"/v1/enrol"})  # where no certificate is needed
# What a recovery core, and the updater that goes on with its work, asks for.
OF_RECOVERY = ("/v1/metadata/", "/v1/targets/", "/v1/node/")

Program = tuple[str, str, str]  # role, version, program digest


def certificate_name(certificate: dict[str, Any] | None) -> tuple[str, str]:
    """(serial, node) of a peer certificate as the ssl module shows it.

    Raises Unauthenticated `no-certificate`, Forbidden `not-a-node`.
    """
    if not certificate:
        raise Unauthenticated("no-certificate", "cannot serve: expected a node's client certificate")
    uris = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    node = names.node_of_uri(uris[0]) if len(uris) == 1 else None
    if node is None:
        raise Forbidden("not-a-node", "cannot serve: the certificate does not name one node")
    return str(certificate["serialNumber"]), node


def program_of(header: str | None) -> Program | None:
    """What `Instar-Program` says about the asking program. Raises InputError `bad-program-header`."""
    if header is None:
        return None
    parts = header.split(" ")
    if len(parts) != 3:
        raise InputError(
            "bad-program-header", "cannot read Instar-Program: expected <role> <version> <digest>"
        )
    role, version, digest = parts
    try:
        return names.one_of("role", role, names.PROGRAM_ROLES), names.version(version), names.digest(digest)
    except InputError as error:
        raise InputError("bad-program-header", f"cannot read Instar-Program: {error.text}") from None


def lapsed_rule(method: str, path: str) -> Lapsed:
    """Whether this is served to a node whose certificate has run out. Of a channel its hello decides."""
    if (method, path) in (("POST", "/v1/renew"), ("GET", "/v1/channel")):
        return Lapsed.SERVED
    return Lapsed.WHILE_RECOVERED if path.startswith(OF_RECOVERY) else Lapsed.REFUSED


def make_middleware(standing: Standing) -> Any:
    @web.middleware
    async def identity(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let nobody through without a good certificate, except to enrol."""
        request[PROGRAM] = program_of(request.headers.get("Instar-Program"))
        if request.path not in OPEN_PATHS:
            transport = request.transport
            certificate = transport.get_extra_info("peercert") if transport is not None else None
            serial, node = certificate_name(certificate)
            request[PEER] = await standing.check(serial, node, lapsed_rule(request.method, request.path))
        return await handler(request)

    return identity


def peer(request: web.Request) -> Peer:
    found: Peer = request[PEER]
    return found


def program(request: web.Request) -> Program | None:
    found: Program | None = request[PROGRAM]
    return found
