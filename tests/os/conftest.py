"""One real server for all tests here; for each test a fresh Debian with systemd, in which a node is installed.

INSTAR_OS_CACHE names the folder that keeps the Debian tree between runs. With INSTAR_OS_REQUIRED set, a machine
that cannot run these tests fails them instead of skipping them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from instar_lab import machine
from instar_lab.container import OTHERS, SYSTEMD, Container, Recipe, make_tree, why_not
from instar_lab.program import build, variants
from instar_lab.server import LabServer
from tests.os.node import OsNode
from tests.os.packaged import PackagedNode

OLD, NEW, CRASHES, KILLED = "1.0.0", "1.1.0", "1.2.0", "1.0.1"


class Hall:
    """The server and the releases that it has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = LabServer(folder / "server")
        self.programs: dict[str, build.Program] = {}

    def open(self) -> None:
        self.server.create()
        with self.server.layout.config.open("a") as file:
            file.write("look_floor_s = 0.2\n")
        self.server.start()
        for version in (OLD, NEW):
            self.publish(build.build(version))
        self.publish(variants.variant("crashes-once-activated", CRASHES))
        self.publish(variants.variant("killed-at", KILLED))

    def publish(self, program: build.Program) -> None:
        self.programs[program.version] = program
        self.server.publish(program)

    def close(self) -> None:
        self.server.close()
        machine.end_all_naming(self.folder, grace_s=1.0)
        shutil.rmtree(self.folder, ignore_errors=True)


def tree_of(recipe: Recipe) -> Path:
    """The tree for containers; passes the test over, or fails it, where there can be none."""
    cache = Path(os.environ.get("INSTAR_OS_CACHE") or Path(tempfile.gettempdir()) / "instar-os-cache")
    if reason := why_not(cache, recipe):
        if os.environ.get("INSTAR_OS_REQUIRED"):
            pytest.fail(f"cannot boot a container: {reason}")
        pytest.skip(f"cannot boot a container: {reason}")
    return make_tree(cache, recipe)


@pytest.fixture(scope="session")
def tree() -> Path:
    """With systemd."""
    return tree_of(SYSTEMD)


@pytest.fixture(scope="session")
def other_tree() -> Path:
    """Without systemd, and with OpenRC, runit and supervisor."""
    return tree_of(OTHERS)


@pytest.fixture(scope="session")
def hall(tree: Path) -> Iterator[Hall]:
    made = Hall(Path(tempfile.mkdtemp(prefix="ios-")))
    try:
        made.open()
        yield made
    finally:
        made.close()


@pytest.fixture
def container(tree: Path) -> Iterator[Container]:
    folder = Path(tempfile.mkdtemp(prefix="ios-"))
    try:
        with Container(tree, folder) as booted:
            yield booted
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def node(hall: Hall, container: Container) -> Iterator[OsNode]:
    """A node that is not installed yet, in a group of its own."""
    group = f"g-{uuid.uuid4().hex[:12]}"
    hall.server.api.post("/groups", {"name": group})
    yield OsNode(container, hall.server, hall.programs, group)
    hall.server.check()


@pytest.fixture
def packaged(hall: Hall, container: Container) -> Iterator[PackagedNode]:
    """The same, for the Debian package."""
    group = f"p-{container.folder.name}"
    hall.server.api.post("/groups", {"name": group})
    yield PackagedNode(container, hall.server, hall.programs, group)
    hall.server.check()
