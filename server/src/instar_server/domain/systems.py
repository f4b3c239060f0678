"""A node's operating system in two slots: what may be ordered, and what the node's words make of an order. Pure.

An order is `open` until a final event of line `os` with its generation comes, or an operator cancels it, or the node
is revoked, or has told nothing of it for LAPSE_S. What the node knows better is left to the node: here is refused
only what its last report shows to be no use.

>>> asked("web-1.1.0").target
'os/web-1.1.0.bundle'
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from instar.core import system
from instar.core.errors import InputError, InstarError
from instar.core.releases import version_key
from instar.trust.paths import check_path
from instar_server.domain.errors import Conflict, Precondition

LINE = system.LINE
OPEN, CONFIRMED, REVERTED, CANCELLED, LAPSED = "open", "confirmed", "reverted", "cancelled", "lapsed"
TAKEN_BACK = (CANCELLED, LAPSED)  # here: a node that had begun may still confirm
NONE, KEXEC = "none", "kexec"
FINAL = {"confirmed": CONFIRMED, "reverted": REVERTED}  # phase -> state
ACTIVE = frozenset({"trial", "confirming", "confirmed"})
GOING_BACK = "reverting"
FELL_BACK = "fell-back"
# Steps of the node's own report at which it is too late to cancel.
ACTIVE_STEPS = frozenset({"activate", "watch", "confirm", "revert"})
# The caller could have known; nothing is wrong with the bundle or the way to it.
PRECONDITIONS = frozenset(
    {"wrong-hardware", "too-old-system", "too-old-bundle", "slot-too-small", "cold-boot-not-seen"}
)
# Nothing was written for it: what lies in the slots is what an order before it left there.
REFUSED = PRECONDITIONS | {"already-running", "no-slots", "unknown-slot", "esp-full"}
REVOKED = "revoked"
NOT_ACTIVE, COLD_BOOT_NOT_SEEN = "installed, not active", "confirmed, cold boot not seen"
LEFT, BAD = "left", "bad"  # confirmed once, and its slot is no good any more
MOST_AHEAD_S, MOST_BEHIND_S = 366 * 86400.0, 300.0  # of a cold boot that is ordered
LAPSE_S = 7 * 86400.0  # an order of which the node has told nothing for so long has ended
MISSED_S = 3600.0  # a cold boot that is later than its time by more is not begun any more
MOST_BUNDLE = system.MOST_SOURCE
MOST_FILE = 255 - 65  # bytes of a bundle's file name; the repository puts a SHA-256 and a dot before it
_NAMED = re.compile(r"[^/%]+-[0-9]+\.[0-9]+\.[0-9]+(?:-[0-9a-z]+)?")


class Asked(NamedTuple):
    """A published target, and where its bytes are to come from ('': from the artifacts)."""

    target: str
    source: str


@dataclass(frozen=True, slots=True)
class Update:
    """One order, and what the node told of it. `n`: the number of its newest event; sizes in bytes, times unix."""

    id: str
    node: str
    generation: int
    name: str
    version: str
    digest: str
    target: str
    source: str
    mode: str
    override: bool
    made: float
    made_by: str
    state: str = OPEN
    tx: str = ""
    tx_n: int = 0
    phase: str = ""
    activated: bool = False
    slot: str = ""
    code: str = ""
    text: str = ""
    done: int = 0
    total: int = 0
    fetched: int = 0
    reused: int = 0
    ended: float | None = None


class Told(NamedTuple):
    """An event of line `os`. `number` counts within its transaction."""

    tx: str
    number: int
    generation: int
    phase: str
    code: str = ""
    text: str = ""
    slot: str = ""
    digest: str = ""  # of the system that it is about; '' for not told


class ColdBoot(NamedTuple):
    """One that is wanted at `at` (unix time). `missed`: no more, since the node did not begin with it in time."""

    at: float
    generation: int
    missed: bool = False


def asked(bundle: object) -> Asked:
    """Read `NAME-VERSION`, `os/NAME-VERSION.bundle` or an https URL of such a file.

    Raises InputError `invalid-argument`.
    """
    if not isinstance(bundle, str) or not 0 < len(bundle) <= MOST_BUNDLE:
        got = "nothing" if not bundle else f"{bundle!a:.60}"
        raise _malformed(got)
    source = bundle if "://" in bundle else ""
    named = bundle
    if source:
        system.check_source(source)
        named = "os/" + source.partition("?")[0].rpartition("/")[2]
    elif "/" not in bundle:
        named = f"os/{bundle}.bundle"
    name = named.removeprefix("os/").removesuffix(".bundle")
    if named != f"os/{name}.bundle" or not _NAMED.fullmatch(name) or not name.isprintable():
        raise _malformed(f"{bundle!a:.200}")
    try:
        return Asked(check_path(named, "target"), source)
    except InstarError as error:
        raise _malformed(error.text) from None


def target_of(name: str, version: str) -> str:
    """The target path of a bundle that can be published, and ordered by its name, here and on a node.

    Raises InputError `bad-path`, `bad-version`.
    """
    version_key(version)
    path = check_path(f"os/{name}-{version}.bundle", "target")
    file = path.removeprefix("os/")
    size = len(file.encode())
    if size > MOST_FILE:
        text = f"cannot use the name {name[:40]!a}…: expected {MOST_FILE} bytes at most in {file[:40]!a}…, got {size}"
        raise InputError("bad-path", text)
    if not _NAMED.fullmatch(file.removesuffix(".bundle")) or not name.isprintable() or " " in name:
        text = "expected printable characters without blanks, '/' and '%'"
        raise InputError("bad-path", f"cannot use the name {name!a:.80}: {text}")
    return path


def _malformed(got: str) -> InputError:
    forms = "NAME-VERSION, os/NAME-VERSION.bundle or https://host/path/NAME-VERSION.bundle"
    return InputError(
        "invalid-argument", f"cannot update the system: expected a bundle as {forms}, got {got}"
    )


def check_slots(report: Mapping[str, Any]) -> None:
    """Raises Precondition `failed-precondition` unless the node has told of slots that can be used."""
    if not report.get("slots"):
        error = report.get("error")
        why = f"{error['code']}: {error['text']}" if error else "no-slots: it has told of no system slots"
        raise unfit(why)


def check_fits(
    report: Mapping[str, Any],
    what: str,
    compatible: tuple[str, ...],
    arch: str,
    min_version: str,
    current: bool,
) -> None:
    """Whether the node could take the bundle, as far as its report says. `current`: the report is not older than
    its last system update, so the version that it says to run may be believed.

    Raises Precondition `failed-precondition`.
    """
    hardware, has_arch = report.get("hardware", []), report.get("arch", "")
    if hardware and not set(hardware) & set(compatible):
        raise unfit(f"wrong-hardware: {what} is for {'/'.join(compatible)}, this is {'/'.join(hardware)}")
    if has_arch and has_arch != arch:
        raise unfit(f"wrong-hardware: {what} is for {arch}, this is {has_arch}")
    running = report["slots"].get(report.get("running", "")) or {}
    version = running.get("version", "")
    if current and min_version and version and _older(version, min_version):
        raise unfit(f"too-old-system: {what} needs {min_version} at least, this runs {version}")


def unfit(text: str) -> Precondition:
    return Precondition("failed-precondition", f"cannot work on the system: {text}")


def aborted(node: str, why: str) -> Conflict:
    return Conflict("aborted", f"cannot begin with the system of {node}: {why}")


def until(said: float | None, counts_s: float) -> str:
    """Since when that is so, and until when it counts if the node says no more."""
    times = (datetime.fromtimestamp(each, UTC) for each in (said or 0.0, (said or 0.0) + counts_s))
    at, end = (f"{each:%Y-%m-%d %H:%M:%SZ}" for each in times)
    return f"; it said so at {at}, and if no more is heard this counts until {end}"


def _older(version: str, least: str) -> bool:
    try:
        return version_key(version) < version_key(least)
    except InputError:
        return False  # the node says what it makes of that


def check_time(at: float | None, now: float) -> float:
    """When a cold boot is to be; None: now. Raises InputError `invalid-argument`."""
    when = now if at is None else at
    if not now - MOST_BEHIND_S <= when <= now + MOST_AHEAD_S:  # and no NaN
        text = f"expected a unix time from now until in {MOST_AHEAD_S / 86400:g} days, got {when:g}"
        raise InputError("invalid-argument", f"cannot order a cold boot: {text}")
    return when


def is_late(cold_boot: ColdBoot, now: float) -> bool:
    return now > cold_boot.at + MISSED_S


def as_of(update: Update, report: Mapping[str, Any], revoked: float | None, now: float) -> Update:
    """As it is now: an order ends when its node is revoked (at `revoked`), and when the node has told nothing of it
    for LAPSE_S, neither by an event nor in its `report`."""
    if update.state != OPEN:
        return update
    if revoked is not None:
        return replace(update, state=CANCELLED, code=REVOKED, text="the node was revoked", ended=revoked)
    at_it = (report.get("update") or {}).get("generation") == update.generation
    lapse = update.made + LAPSE_S
    if update.tx or update.slot or at_it or now < lapse:
        return update
    text = f"it was never begun: the node has told nothing of it within {LAPSE_S / 86400:g} days"
    return replace(update, state=LAPSED, code=LAPSED, text=text, ended=lapse)


def after(update: Update, told: Told, now: float) -> Update:
    """What is known once an event of its generation has come. Events may come in any order, and again.

    A node that had begun goes on with what was taken back; what it then confirms is what is so.
    """
    if update.state not in (OPEN, *TAKEN_BACK):
        return update
    if told.digest and told.digest != update.digest:
        return _overruled(update, told, now)
    update = replace(
        update, activated=update.activated or told.phase in ACTIVE, slot=told.slot or update.slot
    )
    if told.tx == update.tx and told.number <= update.tx_n:
        return update
    code, text = update.code, update.text
    if code == LAPSED:  # it was begun after all
        code, text = "", ""
    if told.code and not (update.phase == GOING_BACK and code):  # the first failure is why; the rest is noise
        code, text = told.code, told.text
    update = replace(
        update, tx=told.tx, tx_n=told.number, phase=told.phase, code=code, text=text
    )  # fmt: skip
    final = FINAL.get(told.phase)
    if final == CONFIRMED and told.code == FELL_BACK:
        final = REVERTED  # it was decided for, and the machine did not come back to it: the node has left it
    if final is None or (update.state in TAKEN_BACK and final == REVERTED):
        return update
    return replace(update, state=final, ended=now)


def _overruled(update: Update, told: Told, now: float) -> Update:
    """The node was told to go back to another system: it begins nothing more for this order."""
    if update.state != OPEN or told.phase not in FINAL:
        return update
    text = f"{told.tx}, ordered on the node itself, went against it"
    return replace(update, state=REVERTED, code="superseded", text=text, ended=now)


def outrun(update: Update, generation: int, now: float) -> Update:
    """The node has begun something for a newer order, and begins nothing more for this one. One order at a time
    of a node is open, so the newer one was forgotten: the database was restored from a backup."""
    text = f"the node has had order {generation}, which this server does not know: was it restored from a backup?"
    return replace(update, state=REVERTED, code="superseded", text=text, ended=now)


def too_late(update: Update, report: Mapping[str, Any]) -> bool:
    """Whether the node is at, or past, the switch."""
    under_way = report.get("update") or {}
    mine = under_way.get("generation") == update.generation
    at_switch = mine and under_way.get("step") in ACTIVE_STEPS
    return update.activated or update.phase in (*ACTIVE, GOING_BACK) or at_switch


def outcome(update: Update, report: Mapping[str, Any]) -> str:
    """In one word or few what came of it: '' while it is open."""
    if update.state == REVERTED:
        if update.activated:
            return REVERTED
        return "failed-precondition" if update.code in PRECONDITIONS else "unavailable"
    if update.state != CONFIRMED:
        return "" if update.state == OPEN else update.state
    if update.mode == NONE:
        return NOT_ACTIVE
    slots: Mapping[str, Any] = report.get("slots") or {}
    same = [slot for slot in slots.values() if slot and slot.get("digest") == update.digest]
    if any(slot.get("state") == BAD for slot in same):
        return LEFT
    unseen = any(slot.get("booted_by") == KEXEC and not slot.get("cold_boot_seen") for slot in same)
    return COLD_BOOT_NOT_SEEN if unseen else CONFIRMED


def _why_bad(update: Update, report: Mapping[str, Any]) -> str:
    slots: Mapping[str, Any] = report.get("slots") or {}
    bad = (slot for slot in slots.values() if slot and slot.get("state") == BAD)
    return next((str(slot.get("why", "")) for slot in bad if slot.get("digest") == update.digest), "")


def with_progress(update: Update, report: Mapping[str, Any]) -> Update:
    """With the bytes that the node last told of it."""
    told = report.get("update") or {}
    if update.state not in (OPEN, *TAKEN_BACK) or told.get("generation") != update.generation:
        return update
    most = {name: max(told[name], getattr(update, name)) for name in ("total", "fetched", "reused")}
    slot, tx = told["slot"] or update.slot, update.tx or told["tx"]
    return replace(update, slot=slot, tx=tx, done=told["done"], **most)


def as_wire(update: Update) -> dict[str, Any]:
    """The line `os` of `GET /v1/node/wanted`."""
    told: dict[str, Any] = {
        "version": update.version, "digest": update.digest, "target": update.target,
        "generation": update.generation, "mode": update.mode,
    }  # fmt: skip
    if update.source:
        told["source"] = update.source
    return told | {"override": True} if update.override else told


def as_json(update: Update, report: Mapping[str, Any]) -> dict[str, Any]:
    """As operators see it."""
    shown, result = asdict(with_progress(update, report)), outcome(update, report)
    if result == LEFT:
        shown |= {"code": LEFT, "text": _why_bad(update, report)}
    for inner in ("tx_n", "activated"):
        del shown[inner]
    return shown | {"outcome": result}


def all_as_json(updates: Iterable[Update], report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All of a node, newest first. What lies in a slot was put there by the newest order of its digest that the node
    began with; those before it stay as they ended."""
    shown, later = [], set[str]()
    for each in updates:
        shown.append(as_json(each, {**report, "slots": {}} if each.digest in later else report))
        refused = each.state == REVERTED and not each.activated and each.code in REFUSED
        if each.tx and not refused:
            later.add(each.digest)
    return shown
