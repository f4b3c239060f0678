"""Releases that failed here: kept away for a while, with the reason, and ways to clear it. Pure.

A passing fault must not ban a good release for ever, so every entry ends: after an hour at first,
doubling with each failure up to a week; and a newer wish of an operator lifts it at once. Wall time
(unix) is right here: it spans boots, and a wrong clock costs a retry, never a node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from instar.core.journal import Reason

FIRST_S = 3600.0
LONGEST_S = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class Entry:
    version: str
    reason: Reason
    count: int
    since: float
    until: float
    generation: int = 0  # of the wish that failed; a newer wish of an operator lifts the entry


Quarantine = Mapping[str, Entry]  # by line and digest: 'agent:<digest>'


def key(line: str, digest: str) -> str:
    return f"{line}:{digest}"


def add(
    entries: Quarantine, name: str, version: str, reason: Reason, now: float, generation: int = 0
) -> dict[str, Entry]:
    """The entries with one more failure of `name`."""
    old = entries.get(name)
    count = old.count + 1 if old else 1
    length = min(LONGEST_S, FIRST_S * 2.0 ** (count - 1))
    return {**entries, name: Entry(version, reason, count, now, now + length, generation)}


def keeps_out(entries: Quarantine, name: str, now: float, generation: int = 0) -> Entry | None:
    """The entry that keeps this release away now, if any. `generation` is that of the present wish."""
    entry = entries.get(name)
    return entry if entry is not None and now < entry.until and generation <= entry.generation else None
