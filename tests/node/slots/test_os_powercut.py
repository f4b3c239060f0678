"""The power goes at every call that the disk or the firmware gets in a whole update; some slot always starts.

Each cut is played with what was not synced lost, kept, and half of it kept. Afterwards the machine is started by its
firmware, the updater goes on, and what a cold boot comes to must be a whole system, and the one the records name.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from instar.core.transaction import State
from instar.host.boot.firmware import FALLBACK
from instar.host.records import read_quarantine
from tests.node.powercut import PowerCut
from tests.node.slots.images import Image
from tests.node.slots.powered import SMALL, MachineDisk, powered, small
from tests.node.slots.system import System
from tests.node.world import UNSYNCED

Cut = tuple[
    int, float, Callable[[int], bool]
]  # at which call, how far it comes, and what is kept of the rest
PATTERNS: list[tuple[float, Callable[[int], bool]]] = [
    (0.0, lambda _: False),
    (1.0, lambda _: True),
    (0.6, lambda number: number % 2 == 0),
    (0.4, lambda number: number % 3 == 1),
]
NEVER = 10_000  # a cut that does not come
TWICE, MOST_CALLS = 80, 60
WAYS = [
    "reboot",
    "kexec",
    "none",
    "over",
    "rollback",
    "cold-boot",
]  # over: over a system that is there already


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Image, Image]:
    folder = tmp_path_factory.mktemp("small")
    return small(folder, "1.0.0", 2), small(folder, "1.1.0", 3)


@pytest.fixture(scope="module")
def third(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return small(tmp_path_factory.mktemp("third"), "1.0.5", 4)


class Course:
    """One update, begun again and again from the same state, each time with the power cut elsewhere."""

    def __init__(
        self, place: Path, pair: tuple[Image, Image], third: Image, backend: str, way: str, fault: str
    ) -> None:
        self.place, self.pair, self.third = place, pair, third
        self.backend, self.way, self.fault = backend, way, fault
        self.numbers = count()

    def prepared(self) -> System:
        system = System(self._folder(), *self.pair, self.backend, slot_bytes=SMALL)
        system.power_on()
        if self.way in ("rollback", "cold-boot"):
            assert system.update("reboot" if self.way == "rollback" else "kexec").state is State.CONFIRMED
            system.downs.clear()
        if self.way == "over":
            new = system.new
            system.offer(self.third)
            assert system.update("none", "tx-0").state is State.CONFIRMED
            system.offer(new)
            system.begin()
            return system
        if self.fault:
            version = self.pair[0 if self.way == "rollback" else 1].version
            setattr(system, self.fault, {version})
        {"rollback": system.begin_rollback, "cold-boot": system.begin_cold_boot}.get(
            self.way, lambda: system.begin(self.way)
        )()
        return system

    def _folder(self) -> Path:
        return self.place / str(next(self.numbers))

    def cut(self, *cuts: Cut) -> bool:
        """Whether the power went each time; all that must hold is asserted."""
        system, early, went = self.prepared(), len(cuts) == 1, True
        for at, inside, keeps in cuts:
            system.close()
            disk = MachineDisk(system.folder, at, inside)
            system = powered(system, disk)
            try:
                self.run(system, disk)
                early, went = False, False
                break
            except PowerCut:
                system = self.found(system, disk, keeps)
                data = system.journals.open_all()[-1].progress.data
                early = early and not system.downs and not data.get("down")
                system.power_on()
        system.disk = UNSYNCED
        finished(system)
        self.judge(system, early)
        system.close()
        return went

    def run(self, system: System, disk: MachineDisk) -> None:
        """All of the update, and the first cold boot after it."""
        system.go_on()
        system.power_on()
        disk.settle()
        system.start()

    def found(self, system: System, disk: MachineDisk, keeps: Callable[[int], bool]) -> System:
        """What the power cut has left."""
        system.close()
        folder = self._folder()
        disk.reboot(folder, keeps)
        left = powered(system, UNSYNCED, folder)
        if not torn(left.esp / FALLBACK):  # that, and an empty firmware, would be two faults at once
            assert left.starts_without_variables(), "an empty firmware starts nothing"
        assert left.images_without_a_root() == []
        return left

    def judge(self, system: System, early: bool) -> None:
        progress, (old, new) = system.journals.open_all()[-1].progress, self.pair
        if early and not self.fault:
            assert progress.state is State.CONFIRMED, "it is gone on with as if nothing had been"
        if self.way == "none":
            assert (progress.state, system.version) == (State.CONFIRMED, old.version)
            assert system.records()["b"].state == "installed"
            return
        if self.fault == "panics_cold":  # kexec starts it, the firmware does not
            assert system.version == old.version
        elif self.way == "kexec" and system.version == old.version and not self.fault:
            # the power went in the one try of the firmware: it is not known why it did not come up
            assert system.records()["b"].state in ("bad", "installed")
            assert read_quarantine(system.layout.quarantine)
        elif self.fault:
            assert progress.state is State.REVERTED
            assert system.version == (new if self.way == "rollback" else old).version
        elif progress.state is State.CONFIRMED:
            assert system.version == progress.begin.version
        else:
            assert system.version in (old.version, new.version)
        if self.way == "cold-boot" and self.fault:
            assert system.version == old.version
            assert [entry.version for entry in read_quarantine(system.layout.quarantine).values()] == [
                "1.1.0"
            ]


def torn(path: Path) -> bool:
    return path.exists() and path.stat().st_size == 0


def finished(system: System) -> None:
    """Go on to the end; then two cold boots, which come to one and the same system."""
    assert system.go_on().finished
    assert not list(system.layout.journal.glob("*.unreadable"))
    seen = []
    for _ in range(2):
        system.power_on()
        system.start()
        seen.append(system.version)
        record = system.records()[system.running]
        assert (record.version, record.state in ("good", "installed", "unknown")) == (system.version, True)
        assert system.starts_without_variables()
        assert system.images_without_a_root() == []
    assert seen[0] == seen[1] != "?"
    assert system.boot.state().drift == ()


def courses() -> Iterator[tuple[str, str, str]]:
    for backend in ("firmware", "counting"):
        for way in WAYS:
            yield backend, way, ""
        yield from ((backend, way, fault) for way in ("reboot", "kexec") for fault in ("panics", "broken"))
        yield backend, "kexec", "panics_cold"
        yield from ((backend, "cold-boot", fault) for fault in ("panics_cold", "broken_cold"))
        yield backend, "rollback", "panics"


@pytest.mark.parametrize(("backend", "way", "fault"), list(courses()))
def test_power_cut_at_every_call(
    memory: Path, pair: tuple[Image, Image], third: Image, backend: str, way: str, fault: str
) -> None:
    """Each call with one of the patterns, in turn."""
    course = Course(memory, pair, third, backend, way, fault)
    assert not course.cut((NEVER, *PATTERNS[0]))
    for at in count():
        if not course.cut((at, *PATTERNS[at % len(PATTERNS)])):
            assert at > 20
            return


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "way", "fault"), list(courses()))
def test_power_cut_at_every_call_in_every_way(
    memory: Path, pair: tuple[Image, Image], third: Image, backend: str, way: str, fault: str
) -> None:
    course = Course(memory, pair, third, backend, way, fault)
    for at in count():
        if not all([course.cut((at, *pattern)) for pattern in PATTERNS]):  # noqa: C419 - each is played
            return


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "way", "fault"), list(courses()))
def test_power_that_goes_twice(
    memory: Path, pair: tuple[Image, Image], third: Image, backend: str, way: str, fault: str
) -> None:
    """The second time while the first is being put right."""
    course, chance = (
        Course(memory, pair, third, backend, way, fault),
        random.Random(f"{backend} {way} {fault}"),
    )
    twice = 0
    for _ in range(TWICE):
        first, second = chance.randrange(MOST_CALLS), chance.randrange(MOST_CALLS)
        twice += course.cut((first, *chance.choice(PATTERNS)), (second, *chance.choice(PATTERNS)))
    assert twice
