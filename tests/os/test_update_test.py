"""`instar-lab update-test --system` (M6): against the real systemd of a machine, which is left as it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instar_lab.container import Container
from tests.os.node import STATE, UNITS

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("containers")]

ROOT = Path(__file__).resolve().parents[2]
COUNT = 3
WITHIN_S = 180.0
GAP_S = 5.0  # bounds only: the figures are printed


def shown() -> tuple[Path, ...]:
    """What the tool needs of this machine: the interpreter, its packages, and the sources."""
    wanted = {Path(sys.prefix), Path(sys.base_prefix), ROOT, *(Path(each) for each in sys.path if each)}
    found = sorted(path for path in wanted if path.is_dir() and not path.is_relative_to("/usr"))
    return tuple(path for path in found if not any(path != up and path.is_relative_to(up) for up in found))


class Box:
    def __init__(self, container: Container) -> None:
        self.container = container

    def tool(self, *options: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, sys.path))
        line = [
            "env",
            f"PYTHONPATH={path}",
            "PYTHONDONTWRITEBYTECODE=1",
            sys.executable,
            "-m",
            "instar_lab.main",
        ]
        return self.container.run(*line, "update-test", "--system", "--json", *options, within_s=WITHIN_S)

    def check_clean(self) -> None:
        """Nothing of a node is left."""
        for unit in UNITS:
            assert self.container.property(unit, "LoadState") == "not-found"
        assert not (self.container.root / STATE.lstrip("/")).exists()
        assert not any("instar" in " ".join(seen.words) for seen in self.container.processes())
        assert self.container.run("systemctl", "--failed", "--no-legend").stdout == ""


@pytest.fixture(scope="module")
def box(tree: Path) -> Iterator[Box]:
    folder = Path(tempfile.mkdtemp(prefix="ios-"))
    try:
        with Container(tree, folder, shown=shown()) as booted:
            yield Box(booted)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def told(done: subprocess.CompletedProcess[str], event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.mark.parametrize("mode", ["pull", "native", "recovery"])
def test_updates_under_systemd(box: Box, mode: str) -> None:
    done = box.tool("--mode", mode, "--count", str(COUNT))
    assert done.returncode == 0, done.stdout + done.stderr
    (installing,) = told(done, "installing")
    assert (installing["state"], installing["service"]) == (STATE, "with this machine's service manager")
    for cycle in told(done, "done"):
        assert cycle["reported"] == cycle["to"]["digest"]
        assert 0 < cycle["gap_s"] < GAP_S
    (summary,) = told(done, "summary")
    assert summary["cycles"] == COUNT
    print(f"update test under systemd, {mode}: {summary['seconds']}, away {summary['gap']}")
    box.check_clean()


def test_interrupted_and_refused(box: Box) -> None:
    """A node that is installed already is left alone; an interrupted test takes its own away."""
    unit = box.container.root / "etc/systemd/system" / UNITS[0]
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    refused = box.tool("--count", "1")
    assert refused.returncode == 2
    assert "a node is installed on this machine already" in refused.stderr
    unit.unlink()
    path = os.pathsep.join(filter(None, sys.path))
    script = f"timeout -s TERM 12 env PYTHONPATH={path} {sys.executable} -m instar_lab.main update-test --system --count 0"
    ended = box.container.run("sh", "-c", script, within_s=WITHIN_S)
    assert "uninstalled: nothing is left" in ended.stdout, ended.stdout + ended.stderr
    box.check_clean()
