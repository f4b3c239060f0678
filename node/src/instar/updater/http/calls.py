"""What every call works with, and what it is told of the one request."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from instar.core.errors import InputError
from instar.engine.journal import Journals
from instar.host.clock import Clock
from instar.host.layout import Layout
from instar.host.program import Program
from instar.updater.client import ServerClient
from instar.updater.http.answers import Answer, Stream
from instar.updater.http.connection import Body
from instar.updater.http.heads import Head
from instar.updater.orders import Orders
from instar.updater.targets import Targets

MOST_JSON = 16_384  # bytes of a body that is held in memory


class Services(NamedTuple):
    """Handed in once, used by all connections. `node` is the node's id; `server` makes a client for one thread."""

    layout: Layout
    clock: Clock
    program: Program
    orders: Orders
    targets: Targets
    journals: Journals
    node: str
    server: Callable[[], ServerClient]


class Call(NamedTuple):
    """`caller` is 'operator:<name>' or 'local:<user id>'; `body` must be read before it is answered, or the
    connection is closed. `go_on` tells a client that waits for it (100-continue) to send the body."""

    services: Services
    head: Head
    words: dict[str, str]  # the parts of the path that stand for something
    caller: str
    body: Body | None
    go_on: Callable[[], None]


Handler = Callable[[Call], Answer | Stream]


def json_body(call: Call, known: tuple[str, ...]) -> dict[str, Any]:
    """The body's JSON object, {} without one. Raises InputError `bad-request`, `too-large`."""
    if call.body is None:
        return {}
    if call.body.length > MOST_JSON:
        text = f"cannot read the body: expected at most {MOST_JSON} bytes, got {call.body.length}"
        raise InputError("too-large", text)
    call.go_on()
    try:
        found = json.loads(call.body.whole() or b"{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError("bad-request", "cannot read the body: expected a JSON object")
    for name in found:
        if name not in known:
            text = f"cannot read the body: expected {', '.join(known) or 'no field'}, got {name!a:.60}"
            raise InputError("bad-request", text)
    return found


def number(call: Call, name: str, default: float, least: float, most: float) -> float:
    """A number of the query. Raises InputError `bad-request`."""
    text = call.head.query.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        what = f"expected {name} from {least:g} to {most:g}, got {text!a:.40}"
        raise InputError("bad-request", f"cannot read the query: {what}")
    return value
