"""Fixtures: the fleet's parts, made and ended."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from instar.host.layout import Layout
from instar.host.program import Program
from instar.trust.program import program_digest
from instar_lab.program import build
from tests.agent import spawning
from tests.agent.fleet import VERSION, Authority, Place, Server
from tests.agent.ward import ward  # noqa: F401


@pytest.fixture(autouse=True)
def own_children() -> None:
    """Those of tests before this one are no concern of it."""
    spawning.mark_children()


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The node program, built from this source."""
    path = tmp_path_factory.mktemp("program") / "instar.pyz"
    built = build.build(VERSION)
    build.write(built, path)
    assert program_digest(path.read_bytes()) == built.digest
    return Program(VERSION, built.digest, path, "")


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path is short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="instar-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture
async def server(authority: Authority, tmp_path: Path) -> AsyncIterator[Server]:
    made = Server(authority)
    await made.start(tmp_path)
    yield made
    await made.stop()


@pytest.fixture
async def place(
    short_folder: Path, program: Program, authority: Authority, server: Server
) -> AsyncIterator[Place]:
    """An enrolled node. Every process that was started from it is ended afterwards."""
    made = Place(Layout(short_folder / "state"), program, authority)
    made.layout.state.mkdir()
    made.enrol(server.port)
    yield made
    for agent in made.started:
        if agent.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                agent.process.kill()
            await agent.process.wait()
        sys.stderr.write(f"--- {agent.log.name}\n{agent.said()}")
