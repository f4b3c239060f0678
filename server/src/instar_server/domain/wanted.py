"""Which release a node is wanted to run, from the wishes for its group and for itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

GROUP, NODE = "group", "node"


@dataclass(frozen=True, slots=True)
class Wish:
    """A release wanted for one line of a group or of a node. `generation` grows with every wish made."""

    scope: str  # group | node
    subject: str
    line: str
    version: str
    target: str  # TUF target path
    digest: str  # program digest
    generation: int
    made: float  # unix time
    made_by: str


def effective(wishes: Iterable[Wish], node: str, group: str, floor: int = 0) -> dict[str, Wish]:
    """The wish that counts for each line of a node: its own before its group's.

    `floor` is the least generation to tell the node: it is raised when the node's own wish is
    taken back or the node changes its group, so that what a node is told never goes back.
    """
    chosen: dict[str, Wish] = {}
    for wish in wishes:
        if (wish.scope, wish.subject) not in ((GROUP, group), (NODE, node)):
            continue
        other = chosen.get(wish.line)
        if other is None or wish.scope == NODE:
            chosen[wish.line] = wish
    return {line: _at_least(wish, floor) for line, wish in chosen.items()}


def _at_least(wish: Wish, floor: int) -> Wish:
    if wish.generation >= floor:
        return wish
    return Wish(
        wish.scope,
        wish.subject,
        wish.line,
        wish.version,
        wish.target,
        wish.digest,
        floor,
        wish.made,
        wish.made_by,
    )


def as_wire(node: str, wishes: dict[str, Wish], poll_s: float) -> dict[str, Any]:
    """The answer of `GET /v1/node/wanted`."""
    lines = {
        line: {"version": w.version, "target": w.target, "digest": w.digest, "generation": w.generation}
        for line, w in sorted(wishes.items())
    }
    return {"v": 1, "node": node, "poll_s": poll_s, "lines": lines}
