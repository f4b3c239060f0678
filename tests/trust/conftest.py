from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trust.gateway import gateway, pyz  # noqa: F401
from tests.trust.modules import node, source  # noqa: F401
from tests.trust.world import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A repository with release 1.1.0 published; the node has not asked yet."""
    world = World(tmp_path)
    world.publish("1.1.0")
    yield world
    world.repository.close()
