"""`python -m instar_lab.kills.table`: every point, every recovery; writes docs/kill-points.md."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from instar_lab.kills.run import Range
from instar_lab.kills.scenario import SCENARIOS, Point, Row, Scenario

DOCUMENT = Path(__file__).resolve().parents[4] / "docs" / "kill-points.md"
MOST_REPEATS = 2  # arrivals at one point by one role that are told apart; later ones are waits

INTRO = """\
# Kill points

Made by `python -m instar_lab.kills.table` from real runs: a real server, and one fresh real node for each
row. The process that reaches the point is ended by SIGKILL there, before or after the record or effect
that the point names.

- **kept**: the keeper starts again whatever died, and nothing else is done (a keeper that was itself killed
  is started again, and adopts what lives on).
- **started**: everything of the node is killed at that moment and the node is started again, as by a boot;
  then it is killed once more at the second point (if its recovery comes there), and started once more.

A row stands here only if, without any other help, the node came to rest with exactly one agent and one
updater, each the valid current release of its line, every transaction at its end, and nothing else but the
old or the new release running. A bad release never stays.

"""


def choose(points: Sequence[Point]) -> list[Point]:
    """The points to kill at: each role's first arrivals at each name."""
    return [point for point in points if point.count <= MOST_REPEATS]


def runs_of(scenario: Scenario, points: Sequence[Point]) -> list[tuple[Scenario, Point, Point | None]]:
    """For each point one run that is kept, and one with a second kill a little further on."""
    chosen = choose(points)
    runs: list[tuple[Scenario, Point, Point | None]] = [(scenario, point, None) for point in chosen]
    for number, point in enumerate(chosen):
        later = chosen[min(len(chosen) - 1, number + 1 + number % 5)]
        again = Point(later.role, later.name, 1)  # counted anew from the first kill on
        runs.append((scenario, point, again))
    return runs


def document(rows: Sequence[Row]) -> str:
    absent = len(rows)
    rows = [row for row in rows if row.reached]
    absent -= len(rows)
    parts = [INTRO, f"{len(rows)} runs at {len({(r.scenario, r.point) for r in rows})} points. "]
    parts.append(f"{absent} more runs never came to their point, which depends on who is quicker.\n")
    for scenario in SCENARIOS:
        parts.append(f"\n## {scenario.name}: {', '.join(scenario.lines)} to {scenario.version}\n\n")
        parts.append("| killed: role | at | recovery | killed again at | outcome |\n|---|---|---|---|---|\n")
        for row in rows:
            if row.scenario == scenario.name:
                again = f"{row.again.role} {row.again.name}" if row.again else ""
                at = row.point.name + (f" (arrival {row.point.count})" if row.point.count > 1 else "")
                parts.append(f"| {row.point.role} | {at} | {row.how} | {again} | {row.outcome} |\n")
    return "".join(parts)


def run(every: int, progress: bool) -> list[Row]:
    """All rows; only every `every`-th run, for a short one."""
    folder = Path(tempfile.mkdtemp(prefix="ik-", dir="/tmp"))
    place = Range(folder)
    try:
        place.open()
        runs = []
        for scenario in SCENARIOS:
            runs += runs_of(scenario, place.points(scenario))
        rows = []
        for row in place.kill_all(runs[::every]):
            rows.append(row)
            if progress:
                state = "WRONG" if row.fault else "ok"
                print(
                    f"{len(rows)}/{len(runs[::every])} {state} {row.scenario} {row.point} {row.outcome}",
                    flush=True,
                )
                if row.fault:
                    print(row.fault, flush=True)
        return rows
    finally:
        place.close()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill real nodes at every point of an update.")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th run; no document")
    options = parser.parse_args()
    rows = run(options.every, progress=True)
    wrong = [row for row in rows if row.fault]
    if options.every == 1 and not wrong:
        DOCUMENT.write_text(document(rows))
    print(f"{len(rows)} runs, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
