"""One world for all scenarios of a worker; for each of them a machine of its own.

INSTAR_OS_CACHE names the folder that keeps packages and images between runs. With INSTAR_OS_REQUIRED set, a
machine that cannot run these tests fails them instead of skipping them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from instar_lab.osimage.packages import missing
from tests.os.vm.world import Machine, World, X

pytest.register_assert_rewrite("tests.os.vm.falls")
KEEP = "INSTAR_OS_KEEP"  # a folder for the serial lines


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


@pytest.fixture
def machines(world: World, request: pytest.FixtureRequest) -> Iterator[Callable[..., Machine]]:
    """Makes machines as World.machine does; they are gone after the test."""
    made: list[Machine] = []

    def make(*words: Any, **more: Any) -> Machine:
        made.append(world.machine(*words, **more))
        return made[-1]

    yield make
    for number, machine in enumerate(made):
        if folder := os.environ.get(KEEP):
            Path(folder).mkdir(parents=True, exist_ok=True)
            log = Path(folder) / f"{request.node.name}-{number}.log"
            if machine.vm.serial.exists():
                shutil.copy(machine.vm.serial, log)
        machine.close()
    world.server.check()


@pytest.fixture
def machine(machines: Callable[..., Machine], world: World) -> Machine:
    """One with the sound system X in slot A, off."""
    return machines(world.image(X))
