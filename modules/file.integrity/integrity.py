"""file.integrity: watches paths and tells what was added, changed, renamed or removed below them.

    {"do": "watch", "paths": ["/etc", "/usr/local/bin"], "every_s": 30}   watch these, and no others
    {"do": "unwatch"}                                                     watch nothing, forget the files
    {"do": "status"}
    {"do": "changes", "since": 0, "limit": 100}                           those with a greater number

Files are hashed in small steps, at most a fifth of one core. What is there when a path is watched first is the
base and is no change. Changes are numbered from 1 without gaps, across restarts; the newest 2,000 are kept. They
and the files' digests are saved together, before a change is told to anybody.

In texts, bytes of a name that are no UTF-8 are \\xNN, and a backslash is doubled.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import looking
from looking import Look
from paths import below, checked, spell, unspell
from rounds import Round

MOST_PATHS = 64
MOST_FILES = 20_000
MOST_CHANGES = 2_000
MOST_TOLD = 300  # changes in one reply,
MOST_REPLY = 180_000  # and bytes of JSON
MOST_NAMES, MOST_KEPT = 5 << 20, 4 << 20  # bytes of all paths, of all changes: the state has a bound, too
MOST_REFUSED = 1_000
ENTRIES, BYTES = 200, 1 << 20  # of one step
EVERY_S = 30.0  # from the start of a round to that of the next
LEAST_S, MOST_S = 1.0, 86_400.0
REST = 4.0  # a step is followed by so many times its own length of rest
SAVE_S = 2.0  # between two savings of a round that has not ended
IDLE_S = 1.0


class Service:
    """What the calls of the runner share."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.roots: list[str] = []
        self.settled: list[str] = []  # below these, what is not known is an addition
        self.every_s = EVERY_S
        self.known: dict[str, Look] = {}
        self.refusals: dict[str, str] = {}
        self.changes: list[dict[str, Any]] = []
        self.next = 1
        self.rounds = 0
        self.full = False
        self.trouble = ""
        self._last_round: dict[str, Any] = {}
        self._round: Round | None = None
        self._refused_now: set[str] = set()
        self._inodes: dict[tuple[int, int], str] | None = None
        self._full_now = False
        self._began = self._due = self._saved = 0.0
        self._dirty = False
        self._names = self._kept = 0  # bytes
        self._restore(context.load())

    # --- state

    def _restore(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        try:
            self.known = {unspell(path): Look(*values) for path, values in state["files"].items()}
            self.roots = [unspell(path) for path in state["roots"]]
            self.settled = [unspell(path) for path in state["settled"]]
            self.refusals = {unspell(path): why for path, why in state["refusals"].items()}
            self.changes, self.next, self.rounds = state["changes"], state["next"], state["rounds"]
            self.every_s = state["every_s"]
            self._names = sum(weight(path, look) for path, look in self.known.items())
            self._kept = sum(map(size, self.changes))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RuntimeError(f"cannot go on: the saved state is of another form ({error!r:.80})") from error

    def save(self) -> None:
        """Keep everything. Raises what the runner raises when it cannot."""
        if not self._dirty:
            return
        self._context.save(
            {
                "v": 1,
                "roots": [spell(path) for path in self.roots],
                "settled": [spell(path) for path in self.settled],
                "every_s": self.every_s,
                "rounds": self.rounds,
                "next": self.next,
                "refusals": {spell(path): why for path, why in self.refusals.items()},
                "changes": self.changes,
                "files": {spell(path): list(look) for path, look in self.known.items()},
            }
        )
        self._dirty = False
        self._saved = time.monotonic()

    def _try_to_save(self) -> None:
        """In a step: a full disk is told of as bad health, and tried again."""
        try:
            self.save()
            self.trouble = ""
        except Exception as error:  # noqa: BLE001 (the runner's own kinds of error)
            self.trouble = f"cannot save what was seen: {error}"
            self._saved = time.monotonic()

    # --- steps

    def step(self) -> float:
        """A slice of work; seconds until the next one."""
        now = time.monotonic()
        if self._round is None:
            if not self.roots or now < self._due:
                if self._dirty:
                    self._try_to_save()
                return IDLE_S if not self.roots else min(IDLE_S, max(0.01, self._due - now))
            self._begin(now)
        assert self._round is not None
        if self._round.step(ENTRIES, BYTES):
            self._end(now)
        if self._dirty and (self._round is None or now - self._saved >= SAVE_S):
            self._try_to_save()
        return max(0.01, REST * (time.monotonic() - now))

    def _begin(self, now: float) -> None:
        self._round = Round(self.roots, self.known, self.rounds, MOST_FILES, self)
        self._refused_now, self._inodes, self._full_now = set(), None, False
        self._began = now
        self._due = now + self.every_s

    def _end(self, now: float) -> None:
        round_ = self._round
        assert round_ is not None
        for path in set(self.refusals) - self._refused_now:
            del self.refusals[path]
        self.full = self._full_now or round_.cut
        self.rounds += 1
        if self.settled != self.roots:
            self.settled = list(self.roots)
            self._dirty = True
        self._last_round = {
            "files": round_.files,
            "bytes": round_.bytes,
            "seconds": round(now - self._began, 3),
        }
        self._round, self._inodes = None, None
        self._due = max(self._due, now + LEAST_S)

    def drop_round(self) -> None:
        if self._round is not None:
            self._round.close()
            self._round = None

    # --- what a round tells

    def found(self, path: str, look: Look, still: bool) -> None:
        self.refusals.pop(path, None)
        before = self.known.get(path)
        if before is None:
            self._new(path, look, still)
        elif before != look:
            words = looking.differences(before, look)
            if words == ["content"] and not before.content:
                words = []  # it was not known, it has not changed
            self._remember(path, look)
            if words:
                more = {} if still else {"unstable": True}
                self._tell("changed", path, what=words, before=before.shown(), after=look.shown(), **more)

    def _new(self, path: str, look: Look, still: bool) -> None:
        settled = any(below(path, root) for root in self.settled)
        old = self._old_name(path, look) if settled else None
        if old is not None:
            self._forget(old)
            assert self._round is not None
            self._round.moved(old)
        elif len(self.known) >= MOST_FILES or self._names >= MOST_NAMES:
            if not self.full and not self._full_now:
                self._tell("full", path, text=f"{len(self.known)} files are watched: no more can be")
            self._full_now = True
            return
        self._remember(path, look)
        if old is not None:
            self._tell("renamed", path, old=spell(old), after=look.shown())
        elif settled:
            self._tell("added", path, after=look.shown(), **({} if still else {"unstable": True}))

    def _remember(self, path: str, look: Look) -> None:
        self._forget(path)
        self.known[path] = look
        self._names += weight(path, look)
        self._dirty = True

    def _forget(self, path: str) -> Look | None:
        look = self.known.pop(path, None)
        if look is not None:
            self._names -= weight(path, look)
        return look

    def _old_name(self, path: str, look: Look) -> str | None:
        """The known path that this one was, if it is there no more and everything else is the same."""
        if self._inodes is None:
            self._inodes = {(seen.dev, seen.ino): known for known, seen in self.known.items()}
        old = self._inodes.get((look.dev, look.ino))
        before = self.known.get(old) if old is not None else None
        if old is None or before is None or os.path.lexists(old):
            return None
        same = before._replace(ctime=0) == look._replace(ctime=0)  # a rename itself sets it
        return old if same else None

    def refused(self, path: str, why: str) -> None:
        self._refused_now.add(path)
        if path in self.refusals or len(self.refusals) >= MOST_REFUSED:
            return
        self.refusals[path] = why
        self._tell("unreadable", path, text=why)

    def gone(self, path: str) -> None:
        before = self._forget(path)
        assert before is not None
        self._tell("removed", path, before=before.shown())
        if path in self.roots:
            self.refusals[path] = "it is not there"  # told of as removed: enough
            self._refused_now.add(path)

    def _tell(self, change: str, path: str, **more: Any) -> None:
        told = {"n": self.next, "at": round(time.time(), 3), "change": change, "path": spell(path)} | more
        self.changes.append(told)
        self._kept += size(told)
        self.next += 1
        while len(self.changes) > MOST_CHANGES or self._kept > MOST_KEPT:
            self._kept -= size(self.changes.pop(0))
        self._dirty = True

    # --- questions

    def watch(self, args: dict[str, Any]) -> dict[str, Any]:
        roots = checked(args.get("paths"), MOST_PATHS)
        every_s = _number(args, "every_s", self.every_s, LEAST_S, MOST_S)
        self.drop_round()
        new = [root for root in roots if any(below(root, one) for one in self.settled)]
        self.settled = sorted(
            {*new, *(one for one in self.settled if any(below(one, root) for root in roots))}
        )
        self.roots, self.every_s = roots, every_s
        for path in [path for path in self.known if not any(below(path, root) for root in roots)]:
            self._forget(path)
        self.refusals = {
            path: why for path, why in self.refusals.items() if any(below(path, r) for r in roots)
        }
        self._due, self._dirty = 0.0, True
        self.save()
        return self.status(args)

    def unwatch(self, args: dict[str, Any]) -> dict[str, Any]:
        self.drop_round()
        self.roots, self.settled, self.known, self.refusals, self.full = [], [], {}, {}, False
        self._names = 0
        self._dirty = True
        self.save()
        return self.status(args)

    def status(self, args: dict[str, Any]) -> dict[str, Any]:
        refusals = sorted(self.refusals.items())
        return {
            "watching": [spell(path) for path in self.roots],
            "every_s": self.every_s,
            "files": len(self.known),
            "most_files": MOST_FILES,
            "full": self.full or self._full_now,
            "settled": bool(self.roots) and self.settled == self.roots,
            "looking": self._round is not None,
            "rounds": self.rounds,
            "last_round": self._last_round,
            "last": self.next - 1,
            "unreadable": len(refusals),
            "first_unreadable": [{"path": spell(path)[:1000], "why": why} for path, why in refusals[:20]],
        }

    def told(self, args: dict[str, Any]) -> dict[str, Any]:
        since = int(_number(args, "since", 0, 0, 1 << 53))
        limit = int(_number(args, "limit", 100, 1, MOST_TOLD))
        if since >= self.next:
            raise ValueError(
                f"cannot tell changes since {since}: the last one has the number {self.next - 1}"
            )
        self.save()
        fresh = [change for change in self.changes if change["n"] > since]
        oldest = self.changes[0]["n"] if self.changes else self.next
        fitting = fit(fresh[:limit])
        return {
            "changes": fitting,
            "more": len(fresh) - len(fitting),
            "lost": max(0, oldest - 1 - since),
            "last": self.next - 1,
        }


def weight(path: str, look: Look) -> int:
    """Bytes that a path needs at most in the state, and those of where a link points."""
    return 5 * len(path) + (len(look.content) if look.kind == "link" else 0)


def size(change: dict[str, Any]) -> int:
    return len(json.dumps(change))


def fit(changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many from the front as one reply holds."""
    room = MOST_REPLY
    for number, change in enumerate(changes):
        room -= size(change) + 2
        if room < 0:
            return changes[:number]
    return changes


def _number(args: dict[str, Any], name: str, otherwise: float, least: float, most: float) -> float:
    value = args.get(name, otherwise)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(
            f"cannot use {name!r}: expected a number from {least:g} to {most:g}, got {value!a:.80}"
        )
    return value


QUESTIONS = {
    "watch": (Service.watch, {"do", "paths", "every_s"}),
    "unwatch": (Service.unwatch, {"do"}),
    "status": (Service.status, {"do"}),
    "changes": (Service.told, {"do", "since", "limit"}),
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
    do = args.get("do", "status")
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
    service = _running()
    service.drop_round()
    service.save()


def health(context: Any) -> str:
    return _running().trouble
