"""Runs the courses: records their points, and kills wards at each, a few wards side by side."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from instar.core.errors import InstarError, MachineError
from instar_lab import machine
from instar_lab.kills import killing, modules
from instar_lab.kills.course import Course
from instar_lab.kills.run import KILLED_S, SETTLED_S, Range
from instar_lab.kills.scenario import OLD, Point, Row
from instar_lab.kills.ward import Ward
from instar_lab.node import Node
from instar_server.ctl.client import Client

LANES = 6
RECORDERS = 3
STEADY_S = 0.2  # a process that was seen may have been about to die of the kill
LOOK_S = 0.03
Run = tuple[type[Course], Point, Point | None]


class Lanes:
    """Wards of the server of `place`, which is open. Their rows come one after the other."""

    def __init__(self, place: Range, lanes: int = LANES) -> None:
        self._place, self._lanes = place, lanes
        self._handed = place.folder / "ward.pyz"
        self._made, self._lock = 0, threading.Lock()

    def open(self) -> None:
        server = self._place.server
        modules.publish(server, self._place.folder / "modules")
        server.api.post("/groups", {"name": "wards"})
        server.hand_out(self._place.programs[OLD], server.token(1000, "wards"), self._handed)

    # --- recording

    def points(self, courses: Sequence[type[Course]]) -> dict[str, list[Point]]:
        """Of each course every arrival at a named point in one undisturbed run, in order."""
        parts = [courses[start::RECORDERS] for start in range(RECORDERS)]
        with ThreadPoolExecutor(RECORDERS) as pool:
            return {name: points for found in pool.map(self._record, parts) for name, points in found}

    def _record(self, courses: Sequence[type[Course]]) -> list[tuple[str, list[Point]]]:
        if not courses:
            return []
        found, ward = [], self._ward()
        try:
            for make in courses:
                course, record = make(ward), self._place.folder / f"record-{make.name}"
                course.prepare()
                ward.rest()
                killing.plan(ward.node, [], record)
                course.begin()
                if fault := self._settle(course):
                    logs = ward.node.logs(40)
                    raise MachineError("bad-recording", f"cannot record {make.name}: {fault}\n{logs}")
                found.append((make.name, killing.recorded(record)))
        finally:
            ward.close()
        return found

    # --- killing

    def kill_all(self, runs: Sequence[Run], tell: Callable[[Row], object]) -> list[Row]:
        """Neighbours have the same start mostly: so each lane has a stretch of them. `tell` hears of each row."""
        size = -(-len(runs) // self._lanes) if runs else 1
        parts = [runs[start : start + size] for start in range(0, len(runs), size)]
        with ThreadPoolExecutor(self._lanes) as pool:
            return [row for rows in pool.map(lambda part: self._stretch(part, tell), parts) for row in rows]

    def _stretch(self, runs: Sequence[Run], tell: Callable[[Row], object]) -> list[Row]:
        rows: list[Row] = []
        ward: Ward | None = None
        try:
            for run in runs:
                ward = ward or self._ward()
                row = self._row(ward, *run)
                with self._lock:
                    tell(row)
                rows.append(row)
                if row.fault:  # whatever it is, the next row must not see it
                    ward.close()
                    ward = None
        finally:
            if ward is not None:
                ward.close()
        return rows

    def _row(self, ward: Ward, make: type[Course], point: Point, again: Point | None) -> Row:
        course, began = make(ward), time.monotonic()
        outcome, reached, fault = "", True, ""
        try:
            course.prepare()
            ward.keep_anew()
            ward.rest()
            killing.plan(ward.node, [point] if again is None else [point, again])
            course.begin()
            reached = self._killed(course, 1)
            if again is None and point.role == "keep" and reached:
                killing.start(ward.node)
            if again is not None and reached:
                killing.boot(ward.node)
                self._killed(course, 2)
                killing.boot(ward.node)
            fault = self._settle(course)
            outcome = course.outcome()
        except InstarError as error:
            fault = f"{fault} {error.text}"
        finally:
            killing.forget(ward.node)
        took = time.monotonic() - began
        if fault:
            fault = f"{fault}\n{ward.node.logs(60)}"
        how = "kept" if again is None else "started"
        return Row(make.name, point, again, how, outcome, took, fault, reached)

    def _killed(self, course: Course, kills: int) -> bool:
        """Wait until that many planned kills have happened; False when the course came to its end without."""
        end = time.monotonic() + KILLED_S
        while time.monotonic() < end:
            if killing.happened(course.ward.node) >= kills:
                return True
            if _ended(course) and not course.ward.fault():
                return killing.happened(course.ward.node) >= kills
            machine.pause(LOOK_S)
        return False

    def _settle(self, course: Course) -> str:
        """Wait until the course has ended and the ward rests; '' when all is as it must be, else what is wrong."""
        end = time.monotonic() + SETTLED_S
        while time.monotonic() < end:
            if _ended(course) and not _fault(course):
                machine.pause(STEADY_S)
                if not _fault(course):
                    killing.forget(course.ward.node)  # what follows is looking, and none of the course
                    return course.last() or _fault(course)
            machine.pause(LOOK_S)
        return _fault(course) or "it did not end"

    def _ward(self) -> Ward:
        with self._lock:
            self._made += 1
            name = f"w{self._made}"
        ward = Ward(Node(self._place.folder / name), Client(self._place.server.access))
        ward.open(self._handed)
        return ward


def _ended(course: Course) -> bool:
    try:
        return course.ended()
    except InstarError:
        return False


def _fault(course: Course) -> str:
    try:
        return course.fault() or course.ward.fault()
    except InstarError as error:
        return error.text
