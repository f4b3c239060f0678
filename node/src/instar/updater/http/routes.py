"""The calls of the API, in one table: the OpenAPI document and the tests go by it."""

from __future__ import annotations

import logging
import re
from typing import NamedTuple

from instar.core.errors import InputError
from instar.updater.http import documents, watching
from instar.updater.http.answers import Answer, Stream
from instar.updater.http.calls import Call, Handler, json_body, number

TX = re.compile(r"tx-[0-9a-f]{16}")
MOST_LISTED = 50

log = logging.getLogger("instar.updater")


class Route(NamedTuple):
    """`query` names what may stand behind the `?`."""

    method: str
    path: str
    handler: Handler
    query: tuple[str, ...] = ()


def _health(call: Call) -> Answer:
    return Answer(200, documents.health(call.services))


def _releases(call: Call) -> Answer:
    return Answer(200, documents.releases(call.services))


def _transactions(call: Call) -> Answer:
    limit = int(number(call, "limit", 20, 1, MOST_LISTED))
    return Answer(200, documents.transactions(call.services, limit))


def _push(call: Call) -> Answer:
    from instar.updater.http.push import push

    return push(call)


def _rollback(call: Call) -> Answer:
    from instar.updater.ordered import previous_release

    line = json_body(call, ("line",)).get("line", "agent")
    if not isinstance(line, str):
        raise InputError("bad-request", "cannot read the body: expected line to be a string")
    release = previous_release(call.services.targets, line)
    tx = call.services.orders.order_rollback(line)
    log.info("%s wants %s back on %s: %s", call.caller, line, release.name, tx)
    return Answer(
        202,
        {"tx": tx, "line": line, "version": release.version, "digest": release.digest},
        (("Location", f"/v1/transactions/{tx}"),),
    )


def _system(call: Call) -> Answer:
    from instar.updater.http.system import system

    return system(call)


def _update_os(call: Call) -> Answer:
    from instar.updater.http.system import update_os

    return update_os(call)


def _look(call: Call) -> Answer:
    json_body(call, ())
    call.services.orders.wake.set()
    return Answer(202, {})


def _openapi(call: Call) -> Answer:
    from instar.updater.http.openapi import document

    return Answer(200, document(call.services.program.version))


ROUTES = (
    Route("GET", "/v1/health", _health),
    Route("GET", "/v1/releases", _releases),
    Route("GET", "/v1/transactions", _transactions, ("limit",)),
    Route("GET", "/v1/transactions/{tx}", watching.one, ("wait_s",)),
    Route("GET", "/v1/transactions/{tx}/events", watching.events),
    Route("POST", "/v1/push", _push, ("line",)),
    Route("POST", "/v1/rollback", _rollback),
    Route("GET", "/v1/system", _system),
    Route("POST", "/v1/update-os", _update_os),
    Route("POST", "/v1/look", _look),
    Route("GET", "/v1/openapi.json", _openapi),
)


class NoMethodError(InputError):
    """The path is there, the method is not; `allowed` are those that are."""

    def __init__(self, method: str, path: str, allowed: list[str]) -> None:
        text = f"cannot {method[:20]} {path[:120]}: expected {' or '.join(allowed)}"
        super().__init__("method-not-allowed", text)
        self.allowed = allowed


def find(method: str, path: str) -> tuple[Route, dict[str, str]]:
    """The route of a request, and the words that its path holds. Raises InputError `not-found`, NoMethodError."""
    fits = [(route, words) for route in ROUTES if (words := _match(route.path, path)) is not None]
    for route, words in fits:
        if route.method == method:
            return route, words
    if fits:
        raise NoMethodError(method, path, [route.method for route, _ in fits])
    raise InputError("not-found", f"cannot find {path[:120]}: see /v1/openapi.json")


def _match(template: str, path: str) -> dict[str, str] | None:
    want, got = template.split("/"), path.split("/")
    if len(want) != len(got):
        return None
    words = {w.strip("{}"): g for w, g in zip(want, got, strict=True) if w.startswith("{")}
    same = all(w == g or (w == "{tx}" and TX.fullmatch(g)) for w, g in zip(want, got, strict=True))
    return words if same else None


def handle(call: Call, route: Route) -> Answer | Stream:
    """Raises InstarError, which is the answer then."""
    for name in call.head.query:
        if name not in route.query:
            known = ", ".join(route.query) or "no query"
            raise InputError("bad-request", f"cannot read the query: expected {known}, got {name!a:.60}")
    return route.handler(call)
