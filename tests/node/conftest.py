"""Fixtures of the node's tests, and hypothesis made repeatable."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from instar.host import points
from tests.node.world import Node

if TYPE_CHECKING:
    from tests.node.system_host import Hall, SystemHost

settings.register_profile(
    "node",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("node")

MEMORY = Path("/dev/shm")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="instar-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where there is one: for many power cuts that only the code has to survive."""
    place = str(MEMORY) if MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="i-", dir=place, ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture
def node(folder: Path) -> Iterator[Node]:
    """A node on release 1.0.0, with a server that offers 1.1.0."""
    made = Node(folder / "state")
    yield made
    made.close()


@pytest.fixture(scope="session")
def hall() -> Iterator[Hall]:
    """A real server with bundles of a small system; one for all of a worker's tests."""
    from instar_lab import machine
    from tests.node.system_host import Hall

    place = Path(tempfile.mkdtemp(prefix="isy-", dir="/tmp"))
    made = Hall(place)
    try:
        made.open()
        yield made
    finally:
        made.close()
        machine.end_all_naming(place, grace_s=0.5)
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def system_host(hall: Hall, folder: Path) -> Iterator[SystemHost]:
    """A node with two slots, connected to that server."""
    from tests.node.system_host import SystemHost

    made = SystemHost(hall, folder)
    try:
        made.start()
        made.connected()
        yield made
    finally:
        made.close()


@pytest.fixture
def listener() -> Iterator[None]:
    """Puts the hook of the kill points back."""
    yield
    points.listener = None
