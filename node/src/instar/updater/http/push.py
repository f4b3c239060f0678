"""POST /v1/push: a parcel from the body to the disk, block by block, and from there into a transaction.

The order that must hold: the words of the head, who else is at work, space; then the body, unpacked as it
comes and hashed as a whole; only when its SHA-384 is the announced one is the parcel kept, and ordered. What
is refused leaves nothing. Whether the release may be trusted is not judged here: the transaction's first step
verifies the parcel's metadata as if they had been fetched.
"""

from __future__ import annotations

import logging
import re
import uuid

from instar.core.errors import InputError
from instar.core.releases import Release
from instar.host.disks import check_space
from instar.host.files import make_folder
from instar.host.incoming import Incoming
from instar.host.layout import LINES
from instar.host.parcel import LIMITS, Parcel
from instar.updater.http.answers import Answer
from instar.updater.http.calls import Call, Services
from instar.updater.http.connection import Body
from instar.updater.orders import Orders, Pushed

SHA384 = re.compile(r"[0-9a-f]{96}")
TELL_EVERY = 1 << 20  # bytes between two words about progress

log = logging.getLogger("instar.updater")


def push(call: Call) -> Answer:
    services, line = call.services, call.head.query.get("line", "agent")
    if line not in LINES:
        raise InputError("unknown-line", f"cannot push: expected line agent or updater, got {line!a:.60}")
    body, wanted = call.body, call.head.fields.get("instar-sha384", "").lower()
    if not SHA384.fullmatch(wanted):
        raise InputError(
            "bad-digest", "cannot push: expected Instar-SHA384 with 96 hexadecimal digits of the body"
        )
    if body is None:
        raise InputError("length-required", "cannot push: expected a body, and its Content-Length")
    if not 0 < body.length <= LIMITS.whole:
        raise InputError(
            "too-large", f"cannot push: expected a parcel of at most {LIMITS.whole} bytes, got {body.length}"
        )
    tx = f"tx-{uuid.uuid4().hex[:16]}"
    services.orders.reserve(tx, line, body.length)
    try:
        parcel = _received(services, line, body, wanted, call)
        services.orders.order_push(Pushed(tx, line, parcel.version, parcel.digest, parcel.target))
    finally:
        services.orders.give_up(tx)
    log.info("%s has pushed %s %s: %s", call.caller, line, parcel.version, tx)
    return Answer(
        202,
        {"tx": tx, "line": line, "version": parcel.version, "digest": parcel.digest},
        (("Location", f"/v1/transactions/{tx}"),),
    )


def _received(services: Services, line: str, body: Body, wanted: str, call: Call) -> Parcel:
    """The parcel, whole and in its place. Raises InstarError; then nothing of it is left."""
    folder = services.layout.incoming
    make_folder(folder, 0o700)
    check_space(folder, body.length)
    incoming = Incoming(folder, clock=services.clock)
    before = incoming.of_sha384(wanted)
    call.go_on()
    parcel = incoming.store(_Told(body, services.orders), wanted)
    try:
        _check(services, line, parcel)
    except InputError:
        if before is None:  # else it came by another way, and is not ours to remove
            incoming.remove(parcel)
        raise
    return parcel


def _check(services: Services, line: str, parcel: Parcel) -> None:
    """Raises InputError `wrong-kind`, `already-current`. One that is damaged may be pushed anew."""
    if parcel.kind != "node":
        text = f"cannot push: expected a parcel of a release, got one of kind {parcel.kind}"
        raise InputError("wrong-kind", text)
    release = Release(parcel.version, parcel.digest)
    there = services.targets.of(line).line
    if there.current() == release.name and there.is_valid(release.name):
        text = f"cannot push: {release.name} is what the {line} has already"
        raise InputError("already-current", text)


class _Told:
    """A body that tells how far it is."""

    def __init__(self, body: Body, orders: Orders) -> None:
        self._body, self._orders, self._told = body, orders, 0

    def read(self, most: int, /) -> bytes:
        data = self._body.read(most)
        if self._body.done - self._told >= TELL_EVERY:
            self._told = self._body.done
            self._orders.received(self._told)
        return data
