"""Waiting for a transaction: until it has ended, or event by event. Bounded, whatever becomes of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from instar.core.errors import InputError
from instar.updater.http.answers import Answer, Stream
from instar.updater.http.calls import Call, Services, number
from instar.updater.http.documents import transaction

MOST_WAIT_S = 30.0
STREAM_S = 3600.0
LOOK_S = 0.5  # what a step writes into its journal while it works is told to nobody
PAUSE_S = 0.1  # between two events: bytes come faster than anybody reads of them
ALIVE_S = 10.0


def one(call: Call) -> Answer:
    """GET /v1/transactions/{tx}, at once or when it has ended."""
    end = time.monotonic() + number(call, "wait_s", 0.0, 0.0, MOST_WAIT_S)
    tx, services = call.words["tx"], call.services
    changes = -1
    while True:
        shown = _shown(services, tx) or transaction(services, tx)
        left = end - time.monotonic()
        if shown["finished"] or left <= 0:
            return Answer(200, shown)
        changes = services.orders.wait_past(changes, min(left, LOOK_S))


def events(call: Call) -> Stream:
    """GET /v1/transactions/{tx}/events: the transaction each time that it has changed, until it has ended."""
    tx, services = call.words["tx"], call.services
    transaction(services, tx)  # an unknown one is refused before the stream begins
    return Stream(_parts(services, tx))


def _parts(services: Services, tx: str) -> Iterator[bytes]:
    end, told, last = time.monotonic() + STREAM_S, time.monotonic(), None
    changes = -1
    while time.monotonic() < end:
        shown = _shown(services, tx)
        if shown is None:
            yield b"event: gone\ndata: {}\n\n"  # a push that came to nothing, or an order that did not begin
            return
        if shown != last:
            last, told = shown, time.monotonic()
            yield b"data: " + json.dumps(shown, separators=(",", ":")).encode() + b"\n\n"
            if shown["finished"]:
                return
            time.sleep(PAUSE_S)
        elif time.monotonic() - told >= ALIVE_S:
            told = time.monotonic()
            yield b": still here\n\n"
        changes = services.orders.wait_past(changes, LOOK_S)


def _shown(services: Services, tx: str) -> dict[str, Any] | None:
    """None for one that is not there, looked at again: an order that was just taken has its journal in a moment."""
    for wait_s in (LOOK_S, LOOK_S, 0.0):
        try:
            return transaction(services, tx)
        except InputError:
            time.sleep(wait_s)
    return None
