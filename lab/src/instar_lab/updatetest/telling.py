"""What the update test says: lines for people, or one JSON object a line for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from instar_lab.updatetest.cycle import Cycle
from instar_lab.updatetest.options import Options

STEP_PERCENT = 25.0  # how often progress is told to people


@dataclass(frozen=True, slots=True)
class Spread:
    """Of some measurements, in seconds."""

    median: float
    p99: float
    worst: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of nothing. `p99` is a value that was measured: 99 of a hundred are no greater."""
        if not values:
            return None
        ordered = sorted(values)
        return cls(median(ordered), ordered[math.ceil(0.99 * len(ordered)) - 1], ordered[-1])

    def as_json(self) -> dict[str, float]:
        return {"median": round(self.median, 4), "p99": round(self.p99, 4), "worst": round(self.worst, 4)}


class Text:
    """For people, on standard output."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._told_percent = 0.0

    def _say(self, text: str) -> None:
        print(text, flush=True)

    def installing(self, where: str, by: str, gateway: str) -> None:
        first = self._options.first
        self._say(
            f"server on {gateway}; installing {first.version} {first.short} ({first.source}) below {where}, {by}"
        )

    def connected(self, hello: dict[str, Any]) -> None:
        built = hello["built"] or "it does not say when"
        self._say(
            f"connected: version {hello['version']}, built {built}, {hello['os']} {hello['arch']}, "
            f"Python {hello['python']}, hash {hello['digest'][:12]}"
        )

    def ordered(self, cycle: Cycle) -> None:
        self._told_percent = 0.0
        which = f"{cycle.target.version} {cycle.target.short} ({cycle.target.source})"
        bytes_ = f"{cycle.bytes_due:,} bytes" if cycle.bytes_due else "on its disk already"
        what = "" if cycle.lines == ("agent",) else f" of {' and '.join(cycle.lines)}"
        self._say(
            f"[{cycle.number}] after {cycle.delay_s * 1000:.0f} ms: {self._options.mode} update{what} "
            f"to {which}, {bytes_}"
        )

    def core(self, cycle: Cycle) -> None:
        self._say(f"            the agent runs the recovery core {cycle.core}")

    def progress(self, cycle: Cycle, at: float, what: str, percent: float) -> None:
        """What has no percentage the steps say already; of the rest, not every percent."""
        if percent < 0.0 or (percent < self._told_percent and percent < 100.0):
            return
        self._told_percent = (percent - percent % STEP_PERCENT + STEP_PERCENT) % 100.0
        self._say(f"    {at - cycle.ordered:6.3f} s  {what} {percent:.0f} %")

    def gone(self, cycle: Cycle) -> None:
        self._say(f"    {cycle.gone - cycle.ordered:6.3f} s  disconnected")

    def back(self, cycle: Cycle) -> None:
        self._say(f"    {cycle.back - cycle.ordered:6.3f} s  back with {cycle.target.short}")

    def done(self, cycle: Cycle) -> None:
        gap = "" if cycle.gap_s is None else f"; the {cycle.role} was away for {cycle.gap_s:.3f} s"
        came = (
            f"{cycle.fetched:,} bytes came"
            if cycle.fetched
            else "nothing had to come: the release was still there"
        )
        self._say(f"    {cycle.seconds:6.3f} s  confirmed, hash {cycle.reported[:12]} as wanted{gap}; {came}")

    def failed(self, cycle: Cycle | None, code: str, text: str, logs: str) -> None:
        print(logs, file=sys.stderr)

    def summary(self, cycles: Sequence[Cycle], why: str) -> None:
        count = f"{len(cycles)} of {self._options.count}" if self._options.count else f"{len(cycles)}"
        self._say(f"{count} updates ended on the wanted hash" + (f" ({why})" if why else ""))
        for name, spread in figures(cycles).items():
            if spread is not None:
                self._say(
                    f"  {name}: median {spread.median:.3f} s, p99 {spread.p99:.3f} s, worst {spread.worst:.3f} s"
                )

    def uninstalled(self, fault: str) -> None:
        self._say(f"NOT uninstalled as it should: {fault}" if fault else "uninstalled: nothing is left")


class Json:
    """For programs, on standard output: each object has an `event`."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def _say(self, event: str, **values: Any) -> None:
        print(json.dumps({"event": event, **values}), flush=True)

    def installing(self, where: str, by: str, gateway: str) -> None:
        first = self._options.first
        self._say(
            "installing", server=gateway, state=where, service=by, version=first.version, digest=first.digest,
            source=first.source, mode=self._options.mode, lines=list(self._options.lines),
        )  # fmt: skip

    def connected(self, hello: dict[str, Any]) -> None:
        names = ("node", "version", "digest", "built", "os", "arch", "python")
        self._say("connected", **{name: hello[name] for name in names})

    def ordered(self, cycle: Cycle) -> None:
        self._say(
            "ordered", cycle=cycle.number, delay_ms=round(cycle.delay_s * 1000, 1), to=cycle.target.digest
        )

    def core(self, cycle: Cycle) -> None:
        self._say("core", cycle=cycle.number, version=cycle.core)

    def progress(self, cycle: Cycle, at: float, what: str, percent: float) -> None:
        """`percent` is -1 for what has none."""
        self._say(
            "progress",
            cycle=cycle.number,
            after_s=cycle.since_order(at),
            what=what,
            percent=round(percent, 1),
        )

    def gone(self, cycle: Cycle) -> None:
        self._say("disconnected", cycle=cycle.number, after_s=cycle.since_order(cycle.gone))

    def back(self, cycle: Cycle) -> None:
        self._say(
            "reconnected",
            cycle=cycle.number,
            after_s=cycle.since_order(cycle.back),
            digest=cycle.target.digest,
        )

    def done(self, cycle: Cycle) -> None:
        self._say("done", **cycle.as_json())

    def failed(self, cycle: Cycle | None, code: str, text: str, logs: str) -> None:
        so_far = {} if cycle is None else cycle.as_json()
        self._say("failed", code=code, text=text, **so_far)
        print(logs, file=sys.stderr)

    def summary(self, cycles: Sequence[Cycle], why: str) -> None:
        spreads = {name: spread.as_json() if spread else None for name, spread in figures(cycles).items()}
        self._say(
            "summary", cycles=len(cycles), wanted=self._options.count, why=why, seconds=spreads["seconds per update"],
            gap=spreads["away"], bytes=sum(cycle.fetched for cycle in cycles),
        )  # fmt: skip

    def uninstalled(self, fault: str) -> None:
        self._say("uninstalled", whole=not fault, fault=fault)


def figures(cycles: Sequence[Cycle]) -> dict[str, Spread | None]:
    """Of the updates that ended well."""
    return {
        "seconds per update": Spread.of([cycle.seconds for cycle in cycles]),
        "away": Spread.of([cycle.gap_s for cycle in cycles if cycle.gap_s is not None]),
    }
