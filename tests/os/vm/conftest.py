"""One world for all scenarios of a worker; a machine of their own for some, and one that goes from test to test.

To come up takes a machine half a minute. So what leaves it as it was is tried on one and the same (`on_x`), and what
moves it comes after that (`from_x`, `on_two`). A machine on which a test has failed is given to no other.

INSTAR_OS_CACHE names the folder that keeps packages and images between runs. With INSTAR_OS_REQUIRED set, a
machine that cannot run these tests fails them instead of skipping them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from instar_lab.osimage.packages import missing
from tests.os.vm.world import Machine, World, X, Y

pytest.register_assert_rewrite("tests.os.vm.falls")
KEEP = "INSTAR_OS_KEEP"  # a folder for the serial lines
FAILED = pytest.StashKey[bool]()


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    if absent := missing():
        reason = f"cannot run a virtual machine: these Debian packages are missing: {', '.join(absent)}"
        if os.environ.get("INSTAR_OS_REQUIRED"):
            pytest.fail(reason)
        pytest.skip(reason)
    made = World(Path(tempfile.mkdtemp(prefix="ivm-", dir="/tmp")))
    try:
        made.open()
        yield made
    finally:
        made.close()


class Held:
    """The machine that goes from test to test, if there is one."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._machine: Machine | None = None

    def take(self, fits: Callable[[dict[str, Any]], bool]) -> Machine:
        """It, if what it tells of its system fits and it is at rest; else a new one, on which X has come up."""
        machine = self._machine
        if machine is None or not (machine.vm.running and fits(at_rest(machine))):
            self.drop()
            machine = self._machine = self._world.machine(self._world.image(X))
            machine.start()
        machine.began = machine.since = machine.mark
        return machine

    def drop(self) -> None:
        if self._machine is not None:
            self._machine.close()
        self._machine = None


def at_rest(machine: Machine) -> dict[str, Any]:
    return machine.reported(lambda seen: seen["running"] and not seen["update"], "a node that is at rest")


def runs_x(system: dict[str, Any]) -> bool:
    return bool(system["running"] == "a" and system["slots"]["a"]["version"] == X)


def has_two(system: dict[str, Any]) -> bool:
    """The first system of all is not known as good, since nobody was there to see it pass."""
    slots = system["slots"].values()
    return len(slots) == 2 and all(slot["version"] and slot["state"] in ("good", "unknown") for slot in slots)


@pytest.fixture(scope="session")
def held(world: World) -> Iterator[Held]:
    made = Held(world)
    yield made
    made.drop()


@pytest.fixture
def kept(held: Held, world: World, request: pytest.FixtureRequest) -> Iterator[Held]:
    yield held
    if held._machine is not None:
        keep_serial(held._machine, request.node.name)
    if request.node.stash.get(FAILED, False):
        held.drop()
    world.server.check()


@pytest.fixture
def on_x(kept: Held) -> Machine:
    """One that runs X from slot A, and goes on to do so. What slot B holds is anybody's guess."""
    return kept.take(runs_x)


@pytest.fixture
def from_x(kept: Held) -> Machine:
    """The same, for a test that leaves another system behind."""
    return kept.take(runs_x)


@pytest.fixture
def on_two(kept: Held, world: World) -> Machine:
    """One with two good systems, of which the firmware prefers the one that runs."""
    machine = kept.take(has_two)
    if not has_two(at_rest(machine)):
        assert (
            machine.ended(machine.update_os(world.publish(world.image(Y)), "reboot"))["outcome"]
            == "confirmed"
        )
        machine.reported(has_two, "two good systems")
    return machine


MOVES = ("from_x", "on_two")  # in the order in which they come, behind all others


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ())
        return 1 + next((MOVES.index(name) for name in MOVES if name in names), -1)

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


def keep_serial(machine: Machine, name: str) -> None:
    if (folder := os.environ.get(KEEP)) and machine.vm.serial.exists():
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(machine.vm.serial, Path(folder) / f"{name}.log")


@pytest.fixture
def machines(world: World, held: Held, request: pytest.FixtureRequest) -> Iterator[Callable[..., Machine]]:
    """Makes machines as World.machine does; they are gone after the test."""
    held.drop()
    made: list[Machine] = []

    def make(*words: Any, **more: Any) -> Machine:
        made.append(world.machine(*words, **more))
        return made[-1]

    yield make
    for number, machine in enumerate(made):
        keep_serial(machine, f"{request.node.name}-{number}")
        machine.close()
    world.server.check()


@pytest.fixture
def machine(machines: Callable[..., Machine], world: World) -> Machine:
    """One with the sound system X in slot A, off."""
    return machines(world.image(X))
