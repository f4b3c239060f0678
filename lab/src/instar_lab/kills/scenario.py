"""What a node goes through while it is killed, and what must be true of it at the end."""

from __future__ import annotations

from dataclasses import dataclass, field

OLD = "1.0.0"
GOOD = "1.1.0"

# Short, but the order of everything is that of a real node.
SETTINGS = """\
[trial]
hold_s = {hold_s}
lease_s = 20.0
cap_s = 40.0
attempts = 3

[rehearsal]
within_s = 30.0

[updater]
retry_floor_s = 0.1
retry_cap_s = 0.5
poll_s = 2.0
"""


@dataclass(frozen=True, slots=True)
class Scenario:
    """`variant` is the lab's build that is wanted ('' for a sound one); `ends` what each line must end on."""

    name: str
    version: str
    variant: str
    lines: tuple[str, ...]
    ends: dict[str, tuple[str, ...]] = field(default_factory=dict)
    hold_s: float = 0.3

    @property
    def settings(self) -> str:
        return SETTINGS.format(hold_s=self.hold_s)

    @property
    def group(self) -> str:
        return self.name


# A sound update may end on either release: a kill may cost a try too many. A bad one never stays; it
# crashes after a second, so the hold must be longer.
EITHER, KEPT = (OLD, GOOD), (OLD,)
BOTH = ("updater", "agent")
BAD = "crashes-once-activated"
SCENARIOS = (
    Scenario("update", GOOD, "killed-at", BOTH, {"agent": EITHER, "updater": EITHER}),
    Scenario("bad-agent", "1.2.0", BAD, ("agent",), {"agent": KEPT, "updater": KEPT}, 1.5),
    Scenario("bad-updater", "1.3.0", BAD, ("updater",), {"agent": KEPT, "updater": KEPT}, 1.5),
)


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """The `count`-th arrival of `role` at `name`."""

    role: str
    name: str
    count: int


@dataclass(frozen=True, slots=True)
class Row:
    """One killed run and its end. `again`: the second kill, during recovery; None when there was none."""

    scenario: str
    point: Point
    again: Point | None
    how: str  # who started what afterwards
    outcome: str  # what runs on both lines, and how the transactions ended
    seconds: float
    fault: str = ""  # what was wrong; '' is as it must be
    reached: bool = True  # some arrivals depend on who is quicker, and do not come in each run
