"""Fixtures: programs, a core, a played server, a node."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from instar_lab.program import build, recovery
from instar_lab.program.build import Program
from instar_server.trust.pack import Release
from tests.agent.fleet import Authority
from tests.recovery.gateway import Gateway
from tests.recovery.place import Place
from tests.trust.world import World


@dataclass(frozen=True)
class Builds:
    old: Program
    new: Program
    core: Program
    core_file: Path


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    file = tmp_path_factory.mktemp("core") / "core.pyz"
    core = recovery.build_core("9.0.0")
    build.write(core, file)
    return Builds(build.build("1.0.0"), build.build("1.1.0"), core, file)


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for the sockets of a node."""
    path = Path(tempfile.mkdtemp(prefix="instar-rsc-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
async def gateway(folder: Path, authority: Authority) -> AsyncIterator[Gateway]:
    made = Gateway(folder, authority, World(folder))
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
def release(gateway: Gateway, builds: Builds) -> Release:
    """The one that is wanted."""
    return gateway.publish(builds.new)


@pytest.fixture
async def place(folder: Path, gateway: Gateway, builds: Builds) -> AsyncIterator[Place]:
    """A node on the old release; nothing of it runs yet."""
    made = Place(folder / "state", gateway)
    made.install(builds.old)
    yield made
    sys.stderr.write(made.logs())
    made.end()
