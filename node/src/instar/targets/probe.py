"""The probe after a switch (requirement D6): does the wanted version answer, within so many tries?

It asks over the local socket, many times and quickly at first; only one question in `every_s` counts as a
try. What it found out goes into the journal as `probes`:

    {"candidate": {"release", "ok", "tries", "said": {"version","digest","pid","connected"}, "why", "output"},
     "restored": {…}}                                     when it had to go back, with the output of both

Why not over the network, and how it fits with the trial: docs/adr/0011-probe.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from instar.core.errors import InstarError
from instar.core.releases import Release
from instar.core.settings import ProbeSettings
from instar.targets.kit import Kit

QUICK_S, SLOW_S, QUICK_LOOKS = 0.03, 0.25, 100
MOST_S = 30.0  # of probing what was put back: it runs whatever the probe says
MOST_WORDS = 300  # characters of the last line, in a reason

Ask = Callable[[], dict[str, Any]]


class Probe:
    """One release being asked. `passed` and `failed` are both final; neither holds while there are tries left."""

    def __init__(self, release: Release, settings: ProbeSettings) -> None:
        self._release, self._settings = release, settings
        self._next_try = -math.inf
        self.tries = 0
        self.said: dict[str, Any] = {}
        self.why = "it was not asked"
        self.passed = self.failed = False

    def heard(self, said: dict[str, Any], now: float) -> None:
        """It answered this, at `now` (boot time)."""
        self._count(now)
        if self.passed:
            return
        told = {name: said.get(name) for name in ("version", "digest", "pid", "connected")}
        self.said = {name: value if isinstance(value, (int, bool)) else str(value)[:120]
                     for name, value in told.items() if value is not None}  # fmt: skip
        if (said.get("version"), said.get("digest")) == (self._release.version, self._release.digest):
            self.passed, self.failed, self.why = True, False, ""
        else:
            self.why = f"it says that it is {said.get('version')!s:.40} ({said.get('digest')!s:.12})"

    def silent(self, why: str, now: float) -> None:
        """It did not answer."""
        self._count(now)
        if not self.passed:
            self.why = why

    def _count(self, now: float) -> None:
        if self.passed or self.failed or now < self._next_try:
            return
        if self.tries >= self._settings.tries:
            self.failed = True
            return
        self.tries += 1
        self._next_try = now + self._settings.every_s

    def words(self) -> str:
        """What came of it, in one line."""
        if self.passed:
            return f"{self._release.version} answers"
        count = f"{self.tries} {'try' if self.tries == 1 else 'tries'}"
        return f"{self._release.version} did not answer as it should within {count}: {self.why}"

    def told(self, output: str = "") -> dict[str, Any]:
        """For the journal."""
        return told(self._release.name, self.passed, self.tries, self.why, output, self.said)


def told(
    release: str, ok: bool, tries: int, why: str, output: str = "", said: dict[str, Any] | None = None
) -> dict[str, Any]:
    about: dict[str, Any] = {"release": release, "ok": ok, "tries": tries, "said": said or {}, "why": why}
    return {**about, "output": output} if output or not ok else about


def probe_now(kit: Kit, release: Release, ask: Ask) -> Probe:
    """Ask until it answers as `release`, or its tries, or MOST_S, are used up."""
    probe, end, looks = Probe(release, kit.settings.probe), kit.clock.monotonic() + MOST_S, 0
    while True:
        try:
            probe.heard(ask(), kit.clock.boottime())
        except InstarError as error:
            probe.silent(error.text, kit.clock.boottime())
        if probe.passed or probe.failed or kit.clock.monotonic() >= end:
            return probe
        looks += 1
        kit.sleep(QUICK_S if looks < QUICK_LOOKS else SLOW_S)


@dataclass(frozen=True, slots=True)
class Both:
    """The probes of a release that failed and of the one that was put back, as the journal has them."""

    candidate: dict[str, Any]
    restored: dict[str, Any]

    def in_short(self) -> str:
        """For the reason that is reported."""
        back = self.restored
        last = _last_line(str(self.candidate.get("output", "")))
        words = f"its last words: {last!r}; " if last else ""
        state = "answers again" if back.get("ok") else f"does not answer either: {back.get('why')}"
        return f"{words}{back.get('release')} {state}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-MOST_WORDS:] if lines else ""
