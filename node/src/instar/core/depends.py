"""What depends on what: who must wait for whom, and who never can run. Pure.

>>> graph = {"web": ("db",), "db": (), "old": ("gone",), "a": ("b",), "b": ("a",)}
>>> faults(graph)["old"]
'it depends on gone, which is not on this node'
>>> faults(graph)["a"]
'it depends on b, which depends on it'
>>> sorted(dependents(graph, ["db"])), depths(graph)["web"]
(['db', 'web'], 1)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Graph = Mapping[str, Sequence[str]]  # name -> what it depends on


def faults(graph: Graph) -> dict[str, str]:
    """Name -> why it can never be started, for those that cannot be."""
    found = {}
    for name, needs in graph.items():
        for need in needs:
            if need not in graph:
                found[name] = f"it depends on {need}, which is not on this node"
            elif name in _below(graph, need):
                found[name] = f"it depends on {need}, which depends on it"
            else:
                continue
            break
    return found


def dependents(graph: Graph, names: Iterable[str]) -> set[str]:
    """`names`, and whatever depends on one of them, however far away."""
    found = set(names)
    while more := {name for name, needs in graph.items() if name not in found and found & set(needs)}:
        found |= more
    return found


def depths(graph: Graph) -> dict[str, int]:
    """Name -> how many others, one below the other, it needs at most. Ends for cycles, too."""
    found = dict.fromkeys(graph, 0)
    for _ in graph:  # as many rounds as the longest chain can have links
        for name, needs in graph.items():
            found[name] = max((1 + found[need] for need in needs if need in graph), default=0)
    return found


def _below(graph: Graph, name: str) -> set[str]:
    """`name` and all that it needs, however far away."""
    found, waiting = set(), [name]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting += graph.get(each, ())
    return found
