"""Which nodes an order is for: named ones, a group or all of them, narrowed down by what they are.

>>> narrow({"os": "linux", "rack": 4}, {"os": "linux"}, {"rack": "4"})
True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from instar.core.errors import InputError

COLUMNS = ("os", "arch", "version", "python")  # what a node says in its hello; anything else is a fact
MOST_NODES = 10_000  # named one by one
MOST_CONDITIONS = 16

Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Selector:
    """One of `nodes`, `group` and `all`, or `where` alone, which means all of those."""

    nodes: tuple[str, ...] = ()
    group: str = ""
    all: bool = False
    where: dict[str, Value] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Only what was given."""
        given = {"nodes": list(self.nodes), "group": self.group, "all": self.all, "where": self.where}
        return {name: value for name, value in given.items() if value}


def check(selector: Selector) -> Selector:
    """The selector, if it says who is meant. Raises InputError `bad-selector`."""
    ways = [bool(selector.nodes), bool(selector.group), selector.all]
    if sum(ways) > 1 or not (any(ways) or selector.where):
        raise InputError("bad-selector", "cannot tell for whom: expected one of nodes, group, all or where")
    if len(selector.nodes) > MOST_NODES or len(selector.where) > MOST_CONDITIONS:
        text = f"cannot select: expected at most {MOST_NODES} nodes and {MOST_CONDITIONS} conditions"
        raise InputError("bad-selector", text)
    return selector


def narrow(facts: Mapping[str, Any], columns: Mapping[str, str], where: Mapping[str, Value]) -> bool:
    """Whether a node is what `where` asks for. `columns` go before the facts of the same name."""
    return all(_same(columns.get(name) or facts.get(name), value) for name, value in where.items())


def _same(got: Any, wanted: Value) -> bool:
    """Equal, or equal as they are written: a command line knows only texts."""
    return got is not None and (got == wanted or _text(got) == _text(wanted))


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
