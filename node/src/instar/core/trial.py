"""The trial: a lease that lapses to a revert, and the judgement from what both sides say. Pure.

A release is confirmed only if the local watch and the server both say so. Health is compared with
the health before the update: only what got worse counts. If the updater cannot reach the server
either, the network is at fault, and the lease is stretched up to its cap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from instar.core.lease import Lease as Lease  # noqa: PLC0414 - part of a trial, and imported from here
from instar.core.reason import Reason

NO_REASON = Reason("", "")


@dataclass(frozen=True, slots=True)
class Health:
    """One agent's health as it tells it itself: connected to the server, and its modules' states."""

    connected: bool = False
    modules: dict[str, str] = field(default_factory=dict)

    def worse_than(self, before: Health) -> str:
        """What got worse, in words; '' when nothing did. A module that is gone got worse."""
        if before.connected and not self.connected:
            return "the agent was connected before, and is not now"
        for name, state in sorted(before.modules.items()):
            now = self.modules.get(name, "gone")
            if state == "ok" and now != "ok":
                return f"module {name} was ok before, and is {now} now"
        return ""


def read_health(said: Mapping[str, Any]) -> Health:
    """The health in an agent's answer. What is not of the right form counts as not told."""
    modules = said.get("modules")
    told = modules if isinstance(modules, dict) else {}
    return Health(bool(said.get("connected")), {str(name): str(state) for name, state in told.items()})


@dataclass(frozen=True, slots=True)
class Facts:
    """What the watch saw this time. `up_s` is how long one and the same process has answered."""

    spent_s: float
    answers: bool  # a process answers for the role
    digest: str  # what it says it is
    up_s: float
    health: Health
    verdict: str  # the server's: pass | fail | wait | unreachable
    verdict_reason: Reason = NO_REASON
    back_s: float = math.inf  # since the server was last out of reach during this watch
    silence: str = "it does not answer"  # why, in words, when it does not


@dataclass(frozen=True, slots=True)
class Confirm:
    pass


@dataclass(frozen=True, slots=True)
class Revert:
    reason: Reason
    blame: bool = True  # whether the release is at fault, and goes into quarantine


@dataclass(frozen=True, slots=True)
class Wait:
    """Go on watching; `stretched` when the lease is over, but the network is at fault."""

    missing: str
    stretched: bool = False


Judgement = Confirm | Revert | Wait


def judge(facts: Facts, wanted: str, before: Health, hold_s: float, lease: Lease) -> Judgement:
    """Confirm, revert or wait on. `wanted` is the digest on trial."""
    if facts.verdict == "fail":
        return Revert(facts.verdict_reason)
    missing = _missing(facts, wanted, before, hold_s)
    if not missing:
        return Confirm()
    if facts.spent_s < lease.lease_s:
        return Wait(missing)
    well = facts.answers and facts.digest == wanted
    if well and facts.verdict == "wait" and facts.back_s < lease.lease_s and facts.spent_s < lease.cap_s:
        return Wait(f"the server is back, and has not judged yet: {missing}", stretched=True)
    if not (well and facts.verdict == "unreachable"):
        return Revert(Reason("lease-lapsed", f"not confirmed within {lease.lease_s:g} s: {missing}"))
    if facts.spent_s < lease.cap_s:
        return Wait("nobody on this node can reach the server: the network is at fault", stretched=True)
    text = f"the server could not be reached for {lease.cap_s:g} s, by the old updater either"
    return Revert(Reason("unconfirmed", text), blame=False)


def _missing(facts: Facts, wanted: str, before: Health, hold_s: float) -> str:
    if not facts.answers:
        return facts.silence
    if facts.digest != wanted:
        return f"it reports {facts.digest[:12]}, not {wanted[:12]}"
    if facts.up_s < hold_s:
        return f"it has run for {facts.up_s:.1f} of {hold_s:g} s under one pid"
    if worse := facts.health.worse_than(before):
        return worse
    if facts.verdict != "pass":
        return f"the server's verdict is '{facts.verdict}'"
    return ""
