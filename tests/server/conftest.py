"""One server for most tests of a worker; tests that kill or alter a server start their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.world import World, running


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(
        tmp_path_factory.mktemp("server"), ping_s=2.0, job_s=3.0, look_floor_s=30.0, wrong_tokens=1000
    ) as world:
        world.publish("1.0.0")
        world.publish("1.1.0")
        for version in ("1.0.0", "1.2.0", "1.10.0"):
            world.publish_module("echo", version)
        world.publish_module("inventory", "1.0.0", "service")
        world.publish_module("inventory", "1.1.0", "service")
        yield world
