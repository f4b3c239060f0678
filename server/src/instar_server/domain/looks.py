"""Who needs a look, or is sent what is wanted: connected nodes that do not run it, not told too often.

A look is only a nudge; the node asks what is wanted anyway every `poll_s`. So a lost one costs
time and nothing else, and a node that will not have a release is not nagged. What comes to a node through
its channel is no reason for a look until it is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from instar_server.domain.names import MODULE_LINE
from instar_server.domain.wanted import PULL, Wish, effective, met, unmet

OPEN_PHASES = frozenset({"offered", "staged", "verified", "rehearsed", "trial", "confirming", "reverting"})
ENDED_PHASES = frozenset({"confirmed", "reverted"})
AT_WORK = OPEN_PHASES - {"offered"}  # it has the bytes that it works with; before, it may wait for them


@dataclass(frozen=True, slots=True)
class Observed:
    """A connected node, as last seen. `told` is the highest generation it was nudged about, at `looked_at`.

    `tries` counts the looks about that generation; `tx_phase` is the last phase reported. `told_gone` are the
    lines of modules that it runs and was told are wanted no more. `trouble`: it cannot reach the artifacts. `forced`:
    it takes what comes through its channel although it has it, once for each wish.
    """

    node: str
    group: str
    running: dict[str, str] = field(default_factory=dict)  # line -> program digest
    floor: int = 0
    tx_phase: str = ""
    told: int = 0
    looked_at: float = 0.0
    tries: int = 0
    told_gone: frozenset[str] = frozenset()
    trouble: bool = False
    forced: bool = False


@dataclass(frozen=True, slots=True)
class LookAt:
    """`generation` 0: no wish is unmet, but modules run (lines in `gone`) that nobody wants any more."""

    node: str
    generation: int
    reason: str
    gone: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class SendTo:
    """What a node lacks and cannot or need not fetch, in the order in which it is to come. `at_work`: it is
    in the middle of a transaction, and nothing more should be begun. `again`: what it has, and may take anew."""

    node: str
    wishes: tuple[Wish, ...]
    at_work: bool
    again: tuple[Wish, ...] = ()


@dataclass(frozen=True, slots=True)
class LookRules:
    """Seconds: the first repeat comes after `floor_s`, each later one twice as late, up to `cap_s`."""

    floor_s: float = 30.0
    cap_s: float = 600.0


def decide(wishes: list[Wish], nodes: Iterable[Observed], now: float, rules: LookRules) -> list[LookAt]:
    """The looks that are due now."""
    due = []
    for node, wanted in _wanted(wishes, nodes):
        newest, gone = _newest(wanted, node.running), _gone(wanted, node.running)
        if newest is not None and (newest.generation > node.told or _due_again(node, now, rules)):
            due.append(
                LookAt(node.node, newest.generation, f"{newest.line} {newest.version} is wanted", gone)
            )
        elif gone - node.told_gone:
            reason = f"{min(gone - node.told_gone)} is wanted no more"
            due.append(LookAt(node.node, 0, reason, gone))
    return due


def to_send(wishes: list[Wish], nodes: Iterable[Observed]) -> list[SendTo]:
    """For every node, with nothing in it for most."""
    found = []
    for node, wanted in _wanted(wishes, nodes):
        sent = [wish for wish in unmet(wanted, node.running) if node.trouble or wish.via != PULL]
        again = tuple(met(wanted, node.running)) if node.forced else ()
        found.append(SendTo(node.node, tuple(sent), node.tx_phase in AT_WORK, again))
    return found


def _wanted(wishes: list[Wish], nodes: Iterable[Observed]) -> Iterator[tuple[Observed, dict[str, Wish]]]:
    by_subject: dict[tuple[str, str], list[Wish]] = {}
    for wish in wishes:
        by_subject.setdefault((wish.scope, wish.subject), []).append(wish)
    for node in nodes:
        near = by_subject.get(("group", node.group), []) + by_subject.get(("node", node.node), [])
        yield node, effective(near, node.node, node.group, node.floor)


def _gone(wishes: dict[str, Wish], running: dict[str, str]) -> frozenset[str]:
    """Modules that run without a wish. The other lines stay on what they run when a wish is taken back."""
    return frozenset(line for line in running if line.startswith(MODULE_LINE) and line not in wishes)


def _newest(wishes: dict[str, Wish], running: dict[str, str]) -> Wish | None:
    """The newest wish that is not met, of those that the node fetches. A line whose program is not known counts
    as not met."""
    fetched = (wish for wish in wishes.values() if wish.via == PULL)
    lacking = (wish for wish in fetched if running.get(wish.line) != wish.digest)
    return max(lacking, key=lambda wish: wish.generation, default=None)


def _due_again(node: Observed, now: float, rules: LookRules) -> bool:
    if node.tx_phase in OPEN_PHASES:
        return now - node.looked_at >= rules.cap_s  # it is at work: leave it alone for long
    wait = min(rules.cap_s, rules.floor_s * 2.0 ** min(20, max(0, node.tries - 1)))
    return now - node.looked_at >= wait
