"""A node's history as a chain: each entry's hash covers the hash before it.

So an entry that is changed, taken out or put in between breaks every later hash, and a
truncated tail no longer meets the head that is kept with the node. Old entries may be removed: then the
chain starts from the hash of the last one that was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

FIELDS = (
    "node", "n", "source", "id", "tx", "line", "phase", "version", "digest", "from_version",
    "reason_code", "reason_text", "wall", "boot_id", "stored_at",
)  # fmt: skip
# Came later: in a hash only where they say something, so that what was written before still fits.
LATER: dict[str, int | str] = {"generation": 0, "slot": "", "mode": ""}


@dataclass(frozen=True, slots=True)
class ChainFault:
    """The first entry (its number `n`) that does not fit, and how."""

    n: int
    text: str


def genesis(node: str) -> str:
    """The hash that a node's first entry builds upon."""
    return hashlib.sha256(f"instar-history-1:{node}".encode()).hexdigest()


def link(previous: str, entry: Mapping[str, Any]) -> str:
    """The hash of `entry` after the entry whose hash is `previous`."""
    said = {name: entry[name] for name in FIELDS} | {name: entry[name] for name in LATER if entry.get(name)}
    body = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{previous}\n{body}".encode()).hexdigest()


def first_fault(
    node: str,
    entries: Iterable[Mapping[str, Any]],
    head_n: int,
    head: str,
    start_n: int = 0,
    start: str = "",
) -> ChainFault | None:
    """Check what is kept of a node's history, oldest first, against the kept head. None: it is whole.

    `start_n` and `start` are number and hash of the last entry that was removed for its age.
    """
    previous, n = start if start_n else genesis(node), start_n
    for n, entry in enumerate(entries, start=start_n + 1):
        if entry["n"] != n:
            return ChainFault(n, f"entry {n} is missing: the next one is {entry['n']}")
        hash_ = link(previous, entry)
        if hash_ != entry["hash"]:
            return ChainFault(
                n, f"entry {n} was altered: expected hash {hash_[:12]}…, got {entry['hash'][:12]}…"
            )
        previous = hash_
    if (n, previous) != (head_n, head if head_n else previous):
        return ChainFault(n + 1, f"the history ends at entry {n}, expected {head_n}")
    return None
