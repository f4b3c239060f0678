"""inventory: what the machine is and what runs on it, and what became different since.

    {"do": "get", "part": "hardware"}         hardware, system, ports or processes; without `part` all of them
    {"do": "changes", "since": 0, "limit": 100}
    {"do": "refresh"}                         look now

It looks every five minutes. Hardware, system and ports are compared with the last look, also with the one
before a restart; each difference gets a number, from 1 without gaps, and the newest 1,000 are kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import hardware
import ports
import software

EVERY_S = 300.0
FRESH_S = 5.0  # a look that is younger answers the next question as well
MOST_CHANGES = 1_000
MOST_TOLD = 200
MOST_VALUE = 400  # characters of a value in a change
MOST_REPLY = 200_000  # bytes of JSON
PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "hardware": hardware.look,
    "system": software.system,
    "ports": ports.look,
    "processes": software.processes,
}
COMPARED = ("hardware", "system", "ports")
MOVING = {"system": {"uptime_s", "booted"}}  # values that change by themselves


class Service:
    """What the calls of the runner share."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.parts: dict[str, dict[str, Any]] = {}
        self.changes: list[dict[str, Any]] = []
        self.next = 1
        self.at = 0.0  # unix time of the last look
        self.trouble = ""
        self._looked = float("-inf")  # monotonic
        self._saved = True
        state = context.load()
        if state is not None:
            try:
                self.parts, self.changes = dict(state["parts"]), list(state["changes"])
                self.next, self.at = int(state["next"]), float(state["at"])
            except (KeyError, TypeError, ValueError) as error:
                text = f"cannot go on: the saved state is of another form ({error!r:.80})"
                raise RuntimeError(text) from error

    def step(self) -> float:
        if time.monotonic() - self._looked >= EVERY_S:
            self.look()
        if not self._saved:
            self._try_to_save()
        return max(1.0, self._looked + EVERY_S - time.monotonic()) if self._saved else 10.0

    def look(self) -> None:
        """Look at everything, note the differences, keep both."""
        seen = {name: part() for name, part in PARTS.items()}
        self.at, self._looked = round(time.time(), 3), time.monotonic()
        for name in COMPARED:
            if name in self.parts:
                self._compare(name, self.parts[name], seen[name])
        self._saved = self._saved and all(self._same(name, seen[name]) for name in COMPARED)
        self.parts = seen

    def _same(self, name: str, seen: dict[str, Any]) -> bool:
        return name in self.parts and flat(name, self.parts[name]) == flat(name, seen)

    def _compare(self, part: str, old: dict[str, Any], new: dict[str, Any]) -> None:
        before, after = flat(part, old), flat(part, new)
        for key in sorted({*before, *after}):
            was, now = before.get(key), after.get(key)
            if was == now:
                continue
            change = "added" if key not in before else "removed" if key not in after else "changed"
            told = {"n": self.next, "at": self.at, "part": part, "change": change, "key": key}
            told |= {name: value for name, value in (("before", was), ("after", now)) if value is not None}
            self.changes.append(told)
            self.next += 1
        del self.changes[:-MOST_CHANGES]

    def save(self) -> None:
        if not self._saved:
            kept = {name: self.parts[name] for name in COMPARED if name in self.parts}
            self._context.save(
                {"v": 1, "at": self.at, "next": self.next, "changes": self.changes, "parts": kept}
            )
            self._saved = True

    def _try_to_save(self) -> None:
        try:
            self.save()
            self.trouble = ""
        except Exception as error:  # noqa: BLE001 (the runner's own kinds of error)
            self.trouble = f"cannot save what was seen: {error}"

    def _fresh(self) -> None:
        if time.monotonic() - self._looked >= FRESH_S:
            self.look()
        self.save()  # before anybody is told of it

    # --- questions

    def get(self, args: dict[str, Any]) -> dict[str, Any]:
        part = args.get("part")
        if part is not None and part not in PARTS:
            raise ValueError(f"cannot get {part!a:.80}: expected one of {', '.join(PARTS)}")
        self._fresh()
        wanted = PARTS if part is None else (part,)
        reply: dict[str, Any] = {"at": self.at, "last": self.next - 1}
        for name in wanted:
            reply[name], cut = fit(self.parts[name], MOST_REPLY // len(wanted))
            if cut:
                reply.setdefault("cut", {})[name] = cut
        return reply

    def refresh(self, args: dict[str, Any]) -> dict[str, Any]:
        first = self.next
        self._looked = float("-inf")
        self._fresh()
        return {"at": self.at, "last": self.next - 1, "new": self.next - first}

    def told(self, args: dict[str, Any]) -> dict[str, Any]:
        since, limit = _whole(args, "since", 0, 0, 1 << 53), _whole(args, "limit", 100, 1, MOST_TOLD)
        self._fresh()
        if since >= self.next:
            raise ValueError(
                f"cannot tell changes since {since}: the last one has the number {self.next - 1}"
            )
        fresh = [change for change in self.changes if change["n"] > since]
        oldest = self.changes[0]["n"] if self.changes else self.next
        return {
            "at": self.at,
            "changes": fresh[:limit],
            "more": max(0, len(fresh) - limit),
            "lost": max(0, oldest - 1 - since),
            "last": self.next - 1,
        }


def flat(part: str, value: dict[str, Any]) -> dict[str, str]:
    """A part as 'disks.vda.size' -> text: what can be compared piece by piece, and shown."""
    found: dict[str, str] = {}

    def add(path: str, one: Any) -> None:
        if isinstance(one, dict):
            for key, inner in one.items():
                add(f"{path}.{key}" if path else key, inner)
        else:
            words = one if isinstance(one, str) else json.dumps(one)
            found[path] = words[:MOST_VALUE]

    value = ports.lasting(value) if part == "ports" else value
    add("", {key: one for key, one in value.items() if key not in MOVING.get(part, ())})
    return found


def fit(part: dict[str, Any], room: int) -> tuple[dict[str, Any], int]:
    """As much of a part as has room, and how many of its members have not."""
    found: dict[str, Any] = {}
    for key, value in part.items():
        size = len(json.dumps({key: value}))
        if size <= room:
            found[key] = value
            room -= size
    return found, len(part) - len(found)


def _whole(args: dict[str, Any], name: str, otherwise: int, least: int, most: int) -> int:
    value = args.get(name, otherwise)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"cannot use {name!r}: expected {least} to {most}, got {value!a:.80}")
    return value


QUESTIONS = {
    "get": (Service.get, {"do", "part"}),
    "changes": (Service.told, {"do", "since", "limit"}),
    "refresh": (Service.refresh, {"do"}),
}
_service: Service | None = None


def _running() -> Service:
    if _service is None:
        raise RuntimeError("cannot answer: the service was not started")
    return _service


# --- what the runner calls


def start(context: Any) -> None:
    global _service
    _service = Service(context)


def request(args: dict[str, Any], context: Any) -> dict[str, Any]:
    do = args.get("do", "get")
    if not isinstance(do, str) or do not in QUESTIONS:
        raise ValueError(f"cannot do {do!a:.80}: expected one of {', '.join(QUESTIONS)}")
    answer, known = QUESTIONS[do]
    if unknown := sorted(set(args) - known):
        raise ValueError(f"cannot {do}: expected only {', '.join(sorted(known))}, got {unknown[0]!a:.80}")
    return answer(_running(), args)


def step(context: Any) -> float:
    return _running().step()


def ready_to_stop(context: Any) -> bool:
    _running().save()
    return True


def stop(context: Any) -> None:
    _running().save()


def health(context: Any) -> str:
    return _running().trouble
