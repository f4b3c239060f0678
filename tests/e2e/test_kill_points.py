"""Real nodes, killed by SIGKILL before and after records and effects of what they do (docs/kill-points.md).

The short runs take every n-th row of the table, the soak takes all of them.
"""

from __future__ import annotations

import pytest

from instar_lab.kills import table
from instar_lab.kills.courses import COURSES
from instar_lab.kills.scenario import SCENARIOS

PROGRAMS = [scenario.name for scenario in SCENARIOS]
OTHERS = [course.name for course in COURSES]
SHORT_EVERY, SHORT_OTHERS = 17, 37


def check(every: int, only: list[str]) -> set[str]:
    """The names of what was killed."""
    rows = table.run(every, True, only)
    wrong = [
        f"{row.scenario} {row.point} again {row.again} ({row.how}): {row.fault}" for row in rows if row.fault
    ]
    assert not wrong, "\n\n".join(wrong)
    reached = [row for row in rows if row.reached]
    assert len(reached) >= 0.8 * len(rows), (
        "most kills never happened: the points are not where the table says"
    )
    return {row.scenario for row in rows}


@pytest.mark.xdist_group("kills")
def test_some_kill_points_leave_one_verified_agent() -> None:
    assert check(SHORT_EVERY, PROGRAMS) == set(PROGRAMS)


@pytest.mark.xdist_group("kills")
def test_some_kill_points_of_modules_restarts_and_jobs() -> None:
    assert len(check(SHORT_OTHERS, OTHERS)) >= len(OTHERS) / 2


@pytest.mark.soak
def test_all_kill_points_leave_one_verified_agent() -> None:
    assert check(1, PROGRAMS) == set(PROGRAMS)


@pytest.mark.soak
def test_all_kill_points_of_modules_restarts_and_jobs() -> None:
    assert check(1, OTHERS) == set(OTHERS)
