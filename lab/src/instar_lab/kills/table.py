"""`python -m instar_lab.kills.table`: every point, every recovery; writes docs/kill-points.md.

--only NAME …   these scenarios and courses alone; their sections are made anew, the others stay
--every N       only every N-th run of each; no document
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from instar_lab.kills.course import Course
from instar_lab.kills.courses import COURSES
from instar_lab.kills.document import document, headings
from instar_lab.kills.lanes import Lanes, Run
from instar_lab.kills.run import Range
from instar_lab.kills.scenario import SCENARIOS, Point, Row, Scenario

DOCUMENT = Path(__file__).resolve().parents[4] / "docs" / "kill-points.md"
MOST_REPEATS = 2  # arrivals at one point by one role that are told apart; later ones are waits


def choose(points: Sequence[Point]) -> list[Point]:
    """The points to kill at: each role's first arrivals at each name."""
    return [point for point in points if point.count <= MOST_REPEATS]


def kills_of(points: Sequence[Point]) -> list[tuple[Point, Point | None]]:
    """For each point one run that is kept, and one with a second kill a little further on."""
    chosen = choose(points)
    kills: list[tuple[Point, Point | None]] = [(point, None) for point in chosen]
    for number, point in enumerate(chosen):
        later = chosen[min(len(chosen) - 1, number + 1 + number % 5)]
        kills.append((point, Point(later.role, later.name, 1)))  # counted anew from the first kill on
    return kills


class Progress:
    """Says on stdout how each run ended, where that is wanted."""

    def __init__(self, total: int, on: bool) -> None:
        self._total, self._on, self._done = total, on, 0

    def tell(self, row: Row) -> Row:
        self._done += 1
        if self._on:
            state = "WRONG" if row.fault else "ok" if row.reached else "absent"
            again = f" again {row.again}" if row.again else ""
            what = f"{row.scenario} {row.point}{again} {row.outcome}"
            print(f"{self._done}/{self._total} {state} {row.seconds:.1f} s {what}", flush=True)
            if row.fault:
                print(row.fault, flush=True)
        return row


def run(every: int, progress: bool, only: Sequence[str] = ()) -> list[Row]:
    """The rows of what `only` names (all, if nothing); only every `every`-th run of all, for a short one."""
    scenarios = [scenario for scenario in SCENARIOS if not only or scenario.name in only]
    courses = [course for course in COURSES if not only or course.name in only]
    folder = Path(tempfile.mkdtemp(prefix="ik-", dir="/tmp"))
    place = Range(folder, scenarios)
    try:
        place.open()
        return [*_scenarios(place, scenarios, every, progress), *_courses(place, courses, every, progress)]
    finally:
        place.close()
        shutil.rmtree(folder, ignore_errors=True)


def _scenarios(place: Range, scenarios: Sequence[Scenario], every: int, progress: bool) -> Iterator[Row]:
    runs = [(scenario, *kill) for scenario in scenarios for kill in kills_of(place.points(scenario))][::every]
    told = Progress(len(runs), progress)
    for row in place.kill_all(runs):
        yield told.tell(row)


def _courses(place: Range, courses: Sequence[type[Course]], every: int, progress: bool) -> list[Row]:
    if not courses:
        return []
    lanes = Lanes(place)
    lanes.open()
    points = lanes.points(courses)
    runs: list[Run] = [(course, *kill) for course in courses for kill in kills_of(points[course.name])]
    return lanes.kill_all(runs[::every], Progress(len(runs[::every]), progress).tell)


def main() -> int:
    names = list(headings())
    parser = argparse.ArgumentParser(description="Kill real nodes at every point of what they do.")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th run; no document")
    parser.add_argument("--only", nargs="+", default=[], choices=names, metavar="NAME", help=", ".join(names))
    options = parser.parse_args()
    rows = run(options.every, True, options.only)
    wrong = Counter(row.scenario for row in rows if row.fault)
    if options.every == 1:  # those that are right are written
        ran = [name for name in options.only or names if not wrong[name]]
        DOCUMENT.write_text(document(DOCUMENT.read_text(), ran, rows))
    print(f"{len(rows)} runs, {sum(wrong.values())} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
