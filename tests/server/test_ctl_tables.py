"""Tables of `instarctl` cut no id and no state: not in a pipe, and not on a narrow terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.server.world import ROOT, World


def started(world: World, *words: str, **more: Any) -> subprocess.Popen[bytes]:
    """`instarctl` in a process of its own."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")
    }
    environment |= {
        **world.access(),
        "PYTHONPATH": os.pathsep.join(str(ROOT / part / "src") for part in ("node", "server")),
        "TERM": "dumb",
        **more.pop("environment", {}),
    }
    command = [sys.executable, "-m", "instar_server.ctl.main", *words]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **more)


def piped(world: World, *words: str) -> str:
    out, error = started(world, *words, stdout=subprocess.PIPE).communicate(timeout=180)
    assert not error, error
    return out.decode()


def on_terminal(world: World, columns: int, *words: str) -> str:
    """What stands on a terminal that is so wide."""
    ours, theirs = pty.openpty()
    process = started(world, *words, stdout=theirs, environment={"COLUMNS": str(columns)})
    os.close(theirs)
    found = b""
    while True:
        try:
            block = os.read(ours, 65_536)
        except OSError:  # the other end is closed
            break
        found += block
    os.close(ours)
    _, error = process.communicate(timeout=180)
    assert not error, error
    return found.decode()


@pytest.fixture
def node(world: World) -> str:
    """In a group whose name takes much room."""
    id_ = world.new_node("a-group-with-a-name-that-takes-much-room-on-every-line").id
    world.want("node", id_, "1.1.0")
    return id_


def test_what_goes_into_a_pipe_is_whole(world: World, node: str) -> None:
    (line,) = [line for line in piped(world, "nodes", "list").splitlines() if node in line]
    for words in ("a-group-with-a-name-that-takes-much-room-on-every-line", "never-seen", "never"):
        assert words in line
    shown = piped(world, "wishes")
    assert "…" not in shown
    assert "generation" in shown
    assert any(node in line and "1.1.0" in line for line in shown.splitlines())


@pytest.mark.parametrize("columns", [80, 40])
def test_a_narrow_terminal_shows_ids_and_states_whole(world: World, node: str, columns: int) -> None:
    shown = on_terminal(world, columns, "nodes", "list")
    assert "…" not in shown
    assert any(node in line and "never-seen" in line for line in shown.splitlines()), shown
    assert "last seen" in shown


def test_a_narrow_terminal_shows_names_of_columns_whole(world: World, node: str) -> None:
    shown = on_terminal(world, 80, "wishes")
    assert "…" not in shown
    assert "generation" in shown
    assert node in shown


def test_an_order_is_shown_whole(world: World, node: str, tmp_path: Path) -> None:
    words = ["--node", node, "--no-wait"]
    piped(world, "job", "run", "echo", *words)
    order = world.ask("GET", "/jobs", params={"limit": 1})["orders"][0]["id"]
    shown = on_terminal(world, 40, "job", "show", order)
    assert any(node in line and "queued" in line for line in shown.splitlines()), shown
    assert order in shown
