"""One update, from the order to its end: what is waited for, what is noted, and what counts as a failure."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from instar.core.errors import MachineError, ReleaseError
from instar_lab import machine
from instar_lab.listening import Listener
from instar_lab.updatetest.builds import Build
from instar_lab.updatetest.options import Options
from instar_lab.updatetest.place import Place
from instar_lab.updatetest.stream import Heard, Stream

ANSWERS_WITHIN_S = 30.0
QUIET_S = 1.0  # after so long without a word the server is asked what was missed
CONFIRMED, REVERTED = "confirmed", "reverted"
FAILED = ("failed", "declined", "dropped", "cut")  # states of a transfer that brought nothing
BEFORE = ("queued", "offered")
CORE_PHASES = {"core": "core sent"}


class WrongEnd(ReleaseError):
    """An update did not end on the wanted hash, or not in time."""


@dataclass(slots=True)
class Cycle:
    """What is known of one update. Times are unix time, 0 while it has not happened."""

    number: int
    origin: Build
    target: Build
    lines: tuple[str, ...]
    delay_s: float
    bytes_due: int  # of the archives that must come
    ordered: float = 0.0
    gone: float = 0.0  # the old agent's channel ended
    back: float = 0.0  # the new one's began
    ended: float = 0.0  # it was heard that the last line is confirmed
    reported: str = ""  # the digest that the node reports in the end
    gap_s: float | None = None
    core: str = ""  # the recovery core that brought it
    came: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # native transfer -> bytes there at first, at last
    told: dict[str, float] = field(default_factory=dict)  # what is under way -> percent
    trouble: str = ""  # why a transfer or a recovery ended without success
    steps: dict[str, float] = field(default_factory=dict)  # 'line state' -> when, by the node's journal
    reasons: dict[str, str] = field(default_factory=dict)  # line -> why it was reverted
    transactions: set[str] = field(default_factory=set)
    final: dict[str, str] = field(default_factory=dict)  # line -> confirmed or reverted

    @property
    def role(self) -> str:
        """Whose absence is timed."""
        return "agent" if "agent" in self.lines else "updater"

    @property
    def seconds(self) -> float:
        """From the order to the word that it is confirmed."""
        return self.ended - self.ordered

    @property
    def fetched(self) -> int:
        """Bytes that had to come: not those that were on the node before."""
        return sum(last - first for first, last in self.came.values()) if self.came else self.bytes_due

    def over(self) -> bool:
        away = "agent" in self.lines and not self.back
        return REVERTED in self.final.values() or (set(self.final) == set(self.lines) and not away)

    def since_order(self, moment: float) -> float | None:
        return round(moment - self.ordered, 3) if moment else None

    def as_json(self) -> dict[str, Any]:
        return {
            "cycle": self.number,
            "from": {"version": self.origin.version, "digest": self.origin.digest},
            "to": {
                "version": self.target.version,
                "digest": self.target.digest,
                "source": self.target.source,
            },
            "delay_ms": round(self.delay_s * 1000, 1),
            "gone_s": self.since_order(self.gone),
            "back_s": self.since_order(self.back),
            "confirmed_s": self.since_order(self.ended),
            "gap_s": None if self.gap_s is None else round(self.gap_s, 4),
            "reported": self.reported,
            "bytes": self.fetched,
            "core": self.core,
            "steps": {name: self.since_order(at) for name, at in self.steps.items()},
        }


class Tell(Protocol):
    """Says what happens, to people or programs."""

    def ordered(self, cycle: Cycle) -> None: ...
    def core(self, cycle: Cycle) -> None: ...
    def progress(self, cycle: Cycle, at: float, what: str, percent: float) -> None: ...
    def gone(self, cycle: Cycle) -> None: ...
    def back(self, cycle: Cycle) -> None: ...


class Course:
    """Drives cycles one after the other."""

    def __init__(self, place: Place, stream: Stream, options: Options, tell: Tell) -> None:
        self._place, self._stream, self._options, self._tell = place, stream, options, tell
        self._node = ""
        self._past: set[str] = set()  # transactions of former cycles

    def connected(self, first: Build) -> dict[str, Any]:
        """Wait for the agent that was just installed; what its hello said. Raises WrongEnd."""
        deadline = time.monotonic() + self._options.timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            heard = self._stream.next(min(QUIET_S, left_s))
            if heard is None:
                self._place.server.check()
            elif heard.body["kind"] == "connected":
                self._node = str(heard.body["node"])
                if self._options.mode != "pull":
                    self._stream.follow(f"/nodes/{self._node}/transfer/events")
                if heard.body["digest"] != first.digest:
                    text = f"cannot begin: expected {first.short} to connect, got {heard.body['digest'][:12]}"
                    raise WrongEnd("wrong-hash", text)
                return heard.body
        text = f"cannot begin: expected the agent on its channel within {self._options.timeout_s:g} s, got nothing"
        raise WrongEnd("not-connected", text)

    def run(self, cycle: Cycle, order: Callable[[], None]) -> None:
        """Give the order and wait for the end; `cycle` is filled in. Raises WrongEnd, MachineError."""
        self._await_no_core()
        time.sleep(cycle.delay_s)
        with Listener(self._place.node.layout.socket(cycle.role)) as listener:
            self._await_answer(cycle, listener)
            cycle.ordered = time.time()
            self._tell.ordered(cycle)
            order()
            self._wait(cycle)
            self._gap(cycle, listener)
        self._check(cycle)

    def _await_no_core(self) -> None:
        """What an update was about is confirmed before its core has given the updater's role back. Until then a
        node takes no other, and is asked again after 15 s: as long as the next update would seem to take."""
        if self._options.mode != "recovery":
            return
        state = self._place.node.state
        cores = f"{self._place.node.layout.run / 'recovery'}/"

        def gone() -> bool:
            found = machine.naming(state)
            return not any(word.startswith(cores) for seen in found for word in seen.words)

        machine.wait_for(gone, "the last recovery core to end", self._options.timeout_s, every_s=0.02)

    def _await_answer(self, cycle: Cycle, listener: Listener) -> None:
        """Without the old one's word before, its last word after it means nothing."""
        deadline = time.monotonic() + ANSWERS_WITHIN_S
        while cycle.origin.digest not in listener.last:
            if time.monotonic() > deadline:
                text = f"cannot go on: expected the {cycle.role} {cycle.origin.short} to answer on its socket"
                raise MachineError(
                    "no-answer", f"{text} within {ANSWERS_WITHIN_S:g} s, got {sorted(listener.last)}"
                )
            time.sleep(0.001)

    def _wait(self, cycle: Cycle) -> None:
        deadline = time.monotonic() + self._options.timeout_s
        while not cycle.over():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise WrongEnd("too-late", self._late(cycle))
            heard = self._stream.next(min(QUIET_S, left_s))
            if heard is not None:
                self._take(cycle, heard)
            else:
                self._place.server.check()
                self._catch_up(cycle)
        for line, end in cycle.final.items():
            if end == REVERTED:
                why = cycle.reasons.get(line, "no reason was given")
                text = f"{line} {cycle.target.version} {cycle.target.short} was reverted: {why}"
                raise WrongEnd(REVERTED, text)

    # --- what is heard

    def _take(self, cycle: Cycle, heard: Heard) -> None:
        body = heard.body
        if body.get("node") != self._node:
            return
        match body["kind"]:
            case "event":
                self._event(cycle, heard.at, body)
            case "disconnected" if not cycle.back:
                self._gone(cycle, heard.at)
            case "transfer" if "bytes" in body:
                self._transfer(cycle, heard.at, body)
            case "connected" if "agent" in cycle.lines and body["digest"] == cycle.target.digest:
                self._back(cycle, float(body["since"]))

    def _event(self, cycle: Cycle, at: float, body: dict[str, Any]) -> None:
        """A change of state of a transaction, as the node's journal has it."""
        if (
            body["digest"] != cycle.target.digest
            or body["line"] not in cycle.lines
            or body["tx"] in self._past
        ):
            return
        line, phase = str(body["line"]), str(body["phase"])
        if body["tx"]:  # what the server did to the node is in its history, too, without one
            cycle.transactions.add(str(body["tx"]))
        cycle.steps.setdefault(f"{line} {phase}", float(body["wall"]))
        if body["reason_text"]:
            cycle.reasons[line] = " ".join(str(body["reason_text"]).split())
        if phase in (CONFIRMED, REVERTED):
            cycle.final[line], cycle.ended = phase, at

    def _gone(self, cycle: Cycle, at: float) -> None:
        if not cycle.gone:
            cycle.gone = at
            self._tell.gone(cycle)

    def _back(self, cycle: Cycle, since: float) -> None:
        if not cycle.back:
            self._gone(cycle, since)  # the new channel took the old one's place before that had ended
            cycle.back = since
            self._tell.back(cycle)

    def _catch_up(self, cycle: Cycle) -> None:
        """Ask for what the stream may have missed."""
        server, now = self._place.server, time.time()
        for entry in server.history(self._node):
            if entry["wall"] >= cycle.ordered:
                self._event(cycle, now, entry)
        seen = next(each for each in server.nodes() if each.id == self._node)
        if (
            "agent" in cycle.lines
            and seen.agent == cycle.target.digest
            and seen.connected_since > cycle.ordered
        ):
            self._back(cycle, seen.connected_since)

    def _transfer(self, cycle: Cycle, at: float, view: dict[str, Any]) -> None:
        """How far it is what comes through the control channel, and what a recovery core does."""
        began = view["began"] or 0.0
        if view["digest"] != cycle.target.digest or began < cycle.ordered:
            return
        if view["core"] and not cycle.core:
            cycle.core = str(view["core"])
            self._tell.core(cycle)
        if view["state"] in FAILED and view["ended"]:
            cycle.trouble = f"the {view['via']} update {view['state']}: {view['text'] or view['code']}"
        what = "sent" if view["via"] == "native" else CORE_PHASES.get(view["phase"], str(view["phase"]))
        if view["via"] == "native" and view["state"] not in BEFORE:
            first, _ = cycle.came.get(view["id"], (view["bytes"], 0))
            cycle.came[view["id"]] = (first, view["bytes"])
        if what and cycle.told.get(what) != view["percent"]:
            cycle.told[what] = view["percent"]
            self._tell.progress(cycle, at, what, float(view["percent"]))

    # --- what follows from it

    def _gap(self, cycle: Cycle, listener: Listener) -> None:
        last = listener.last[cycle.origin.digest]
        if cycle.role == "agent":
            cycle.gap_s = cycle.back - last
        elif (first := listener.first.get(cycle.target.digest)) is not None:
            cycle.gap_s = first - last

    def _check(self, cycle: Cycle) -> None:
        """The hash that the node reports for each line, by the server."""
        seen = next(each for each in self._place.server.nodes() if each.id == self._node)
        for line in cycle.lines:
            cycle.reported = seen.agent if line == "agent" else seen.updater
            if cycle.reported != cycle.target.digest:
                got = cycle.reported[:12] or "none"
                text = f"expected the {line} to report {cycle.target.short}, got {got}"
                raise WrongEnd("wrong-hash", text)
        self._past |= cycle.transactions

    def _late(self, cycle: Cycle) -> str:
        last = max(cycle.steps, key=lambda name: cycle.steps[name], default="")
        got = f"'{last}'" if last else "no step of it"
        why = "; ".join(filter(None, (*cycle.reasons.values(), cycle.trouble)))
        missing = " and the new agent on its channel" if "agent" in cycle.lines and not cycle.back else ""
        return (
            f"{cycle.target.version} {cycle.target.short}: expected it confirmed{missing} "
            f"within {self._options.timeout_s:g} s, got {got}" + (f": {why}" if why else "")
        )
