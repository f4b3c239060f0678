"""What the server wants for this node, and what follows from it. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from instar.core.errors import InputError
from instar.core.modules import MOST_MODULES, module_of
from instar.core.releases import Release
from instar.core.system import LINE as SYSTEM
from instar.core.system import ColdBoot, SystemWish, read_cold_boot, read_system

ORDER = ("updater", "agent")  # the updater first, confirmed, then the agent; then the modules, by name


WAYS = ("native", "recovery")  # an unknown way of a newer server is the usual one: to fetch
NATIVE, RECOVERY = WAYS
PLACE = re.compile(r"https://[^\s/?#@]+/?")

FIRST_RETRY_S, LONGEST_RETRY_S = 5.0, 3600.0


def after_failures(count: int) -> float:
    """Seconds to wait after `count` blameless failures of one release in a row: 5, 10, 20 … 3,600."""
    return min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** max(0, min(count, 20) - 1))


@dataclass(frozen=True, slots=True)
class Wish:
    """One line's wanted release. `generation` grows with each wish of the operator."""

    line: str
    release: Release
    target: str
    generation: int
    via: str = ""  # native | recovery: how its bytes come; '' for fetching them


@dataclass(frozen=True, slots=True)
class Wanted:
    """The server's answer. `poll_s`: when to ask again without being told to. `fault`: why what is wanted of the
    operating system cannot be read; that keeps no program waiting."""

    wishes: tuple[Wish, ...]
    poll_s: float
    artifacts: str = ""  # where metadata and targets are served, https://host:port; '' for the server itself
    system: SystemWish | None = None
    cold_boot: ColdBoot | None = None
    fault: str = ""


def read_wanted(body: Any) -> Wanted:
    """Check the server's answer. Unknown lines and fields are passed over.

    Raises InputError: one bad line spoils the whole, for a module whose wish is not read would be retired.
    """
    try:
        lines = body["lines"]
        modules = sorted(line for line in lines if module_of(line))
        if len(modules) > MOST_MODULES:
            raise ValueError(f"expected at most {MOST_MODULES} modules, got {len(modules)}")
        present = [line for line in ORDER if lines.get(line) is not None]
        wishes = tuple(_wish(line, lines[line]) for line in (*present, *modules))
        poll_s = min(86400.0, max(1.0, float(body.get("poll_s", 300.0))))
        artifacts = str(body.get("artifacts") or "")
        if artifacts and not PLACE.fullmatch(artifacts):
            raise ValueError(f"expected artifacts at https://host:port, got {artifacts[:100]!r}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError("bad-wanted", f"cannot read what is wanted: {error!r}") from None
    system, cold_boot, fault = None, None, ""
    try:
        system, cold_boot = read_system(lines.get(SYSTEM)), read_cold_boot(body.get("cold_boot"))
    except InputError as error:
        fault = error.text
    return Wanted(wishes, poll_s, artifacts.rstrip("/"), system, cold_boot, fault)


def _wish(line: str, fields: Any) -> Wish:
    release = Release(str(fields["version"]), str(fields["digest"]))
    via = fields.get("via")
    known = via if via in WAYS and line in ORDER else ""  # modules are fetched
    return Wish(line, release, str(fields["target"]), int(fields["generation"]), known)
