"""Real nodes, killed by SIGKILL before and after records and effects of an update (docs/kill-points.md).

The short run takes every n-th row of the table, the soak takes all of them.
"""

from __future__ import annotations

import pytest

from instar_lab.kills import table
from instar_lab.kills.scenario import SCENARIOS

SHORT_EVERY = 17


def check(every: int) -> None:
    rows = table.run(every, progress=True)
    wrong = [
        f"{row.scenario} {row.point} again {row.again} ({row.how}): {row.fault}" for row in rows if row.fault
    ]
    assert not wrong, "\n\n".join(wrong)
    assert {row.scenario for row in rows} == {scenario.name for scenario in SCENARIOS}
    reached = [row for row in rows if row.reached]
    assert len(reached) >= 0.8 * len(rows), (
        "most kills never happened: the points are not where the table says"
    )


@pytest.mark.xdist_group("kills")
def test_some_kill_points_leave_one_verified_agent() -> None:
    check(SHORT_EVERY)


@pytest.mark.soak
def test_all_kill_points_leave_one_verified_agent() -> None:
    check(1)
