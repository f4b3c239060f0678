"""Which release a node is wanted to run, from the wishes for its group and for itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

GROUP, NODE = "group", "node"
PULL, NATIVE, RECOVERY = "pull", "native", "recovery"
VIAS = (
    PULL,
    NATIVE,
    RECOVERY,
)  # how a release's bytes come: fetched, through the channel, by a recovery core
LINES = ("updater", "agent")  # that can be sent, in the order in which they are replaced


@dataclass(frozen=True, slots=True)
class Wish:
    """A release wanted for one line of a group or of a node. `generation` grows with every wish made; `via` is
    how its bytes come."""

    scope: str  # group | node
    subject: str
    line: str
    version: str
    target: str  # TUF target path
    digest: str  # program digest
    generation: int
    made: float  # unix time
    made_by: str
    via: str = PULL


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
    return wish if wish.generation >= floor else replace(wish, generation=floor)


def unmet(wishes: dict[str, Wish], running: dict[str, str]) -> list[Wish]:
    """The wishes for what can be sent that are not met, in the order in which they are to be. A line whose
    program is not known counts as not met."""
    wanted = (wishes[line] for line in LINES if line in wishes)
    return [wish for wish in wanted if running.get(wish.line) != wish.digest]


def met(wishes: dict[str, Wish], running: dict[str, str]) -> list[Wish]:
    """The wishes that are met, of those whose bytes come through the channel, in the same order: a node that is
    forced takes them once more."""
    wanted = (wishes[line] for line in LINES if line in wishes)
    return [wish for wish in wanted if wish.via == NATIVE and running.get(wish.line) == wish.digest]


def as_wire(
    node: str,
    wishes: dict[str, Wish],
    poll_s: float,
    artifacts: str = "",
    system: dict[str, Any] | None = None,
    cold_boot: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The answer of `GET /v1/node/wanted`. `artifacts`: where metadata and targets are, if not here; `system` and
    `cold_boot`: what is wanted of the operating system."""
    lines = {line: _line(wish) for line, wish in sorted(wishes.items())}
    if system is not None:
        lines["os"] = system
    body: dict[str, Any] = {"v": 1, "node": node, "poll_s": poll_s, "lines": lines}
    body |= {"artifacts": artifacts} if artifacts else {}
    return body | {"cold_boot": cold_boot} if cold_boot is not None else body


def _line(wish: Wish) -> dict[str, Any]:
    told = {name: getattr(wish, name) for name in ("version", "target", "digest", "generation")}
    return told if wish.via == PULL else told | {"via": wish.via}
