"""Lines that an operator has pushed a release to: they keep it, whatever the server wants. Pure.

A hold stands against wishes that are no newer than the push, and only while the pushed release is what is
current. A newer wish of an operator ends it, and so does a way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from instar.core.releases import Release

UNHEARD = -1  # generation of a push that was made before this node had heard what the server wants


@dataclass(frozen=True, slots=True)
class Hold:
    """`generation` is that of the newest wish that the push went against, 0 for none."""

    version: str
    digest: str
    generation: int
    since: float  # unix time, for people

    @property
    def release(self) -> str:
        """The name of the release that is held."""
        return Release(self.version, self.digest).name


Held = Mapping[str, Hold]  # by line


def heard(held: Held, generations: Mapping[str, int]) -> dict[str, Hold]:
    """What is held once the server has said what it wants: `generations` of its wishes, by line.

    A newer wish ends the hold of its line. What was pushed before anything was heard goes against the wish
    that is heard first.
    """
    left: dict[str, Hold] = {}
    for line, hold in held.items():
        now = generations.get(line, 0)
        if hold.generation == UNHEARD:
            left[line] = replace(hold, generation=now)
        elif now <= hold.generation:
            left[line] = hold
    return left


def keeps(held: Held, line: str, current: str) -> Hold | None:
    """The hold that keeps `current`, a release's name, on `line`; None when nothing does."""
    hold = held.get(line)
    return hold if hold is not None and hold.release == current else None
