"""`instar-lab update-test --system` (M6): against the real systemd of a machine, which is left as it was."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instar_lab import machine
from instar_lab.container import Container
from instar_lab.updatetest import inside
from tests.os.node import STATE, UNITS

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("containers")]

COUNT = 3
WITHIN_S = 180.0
INTERRUPT = """
{tool} > /tmp/said 2>&1 &
until grep -q disconnected /tmp/said || ! kill -0 $!; do sleep 0.1; done
kill -TERM $!; wait $!; status=$?; cat /tmp/said; exit $status
"""
ASKED_AGAIN_S = 15.0  # instar_server.services.recovery.BACK_S
GAP_S = 5.0  # bounds only: the figures are printed


class Box:
    def __init__(self, container: Container) -> None:
        self.container = container

    def tool(self, *options: str) -> subprocess.CompletedProcess[str]:
        return inside.run(self.container, *options, within_s=WITHIN_S)

    def check_clean(self) -> None:
        """Nothing of a node is left."""
        for unit in UNITS:
            assert self.container.property(unit, "LoadState") == "not-found"
        assert not (self.container.root / STATE.lstrip("/")).exists()
        assert not any("instar" in " ".join(seen.words) for seen in self.container.processes())
        assert self.container.run("systemctl", "--failed", "--no-legend").stdout == ""


@pytest.fixture
def supervised(other_tree: Path) -> Iterator[Container]:
    """A machine whose service manager takes a second or two for each start."""
    folder = Path(tempfile.mkdtemp(prefix="ios-"))
    first = ("supervisord", "-n", "-c", "/etc/supervisor/supervisord.conf")
    try:
        with Container(other_tree, folder, first, shown=inside.shown()) as booted:
            machine.wait_for(
                lambda: booted.run("test", "-e", "/run/supervisor.sock").returncode == 0, "supervisord", 20.0,
                lambda: machine.tail(booted.console),
            )  # fmt: skip
            yield booted
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def box(tree: Path) -> Iterator[Box]:
    folder = Path(tempfile.mkdtemp(prefix="ios-"))
    try:
        with Container(tree, folder, shown=inside.shown()) as booted:
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


def test_a_recovery_waits_for_the_end_of_the_last_core(supervised: Container) -> None:
    """A node whose core is at work refuses the next one, and is asked again only after 15 s."""
    options = ["--mode", "recovery", "--line", "both", "--max-delay", "0", "--count", "2"]
    done = inside.run(supervised, *options, within_s=WITHIN_S)
    assert done.returncode == 0, done.stdout + done.stderr
    for cycle in told(done, "done"):
        assert cycle["steps"]["updater recovery-downloaded"] < ASKED_AGAIN_S


def test_interrupted_and_refused(box: Box) -> None:
    """A node that is installed already is left alone; an interrupted test takes its own away."""
    unit = box.container.root / "etc/systemd/system" / UNITS[0]
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    refused = box.tool("--count", "1")
    assert refused.returncode == 2
    assert "a node is installed on this machine already" in refused.stderr
    unit.unlink()
    ended = box.container.run(
        "sh", "-c", INTERRUPT.format(tool=" ".join(inside.words("--count", "0"))), within_s=WITHIN_S
    )
    assert "uninstalled: nothing is left" in ended.stdout, ended.stdout + ended.stderr
    assert ended.returncode == 0, "--count 0 goes on until it is interrupted"
    box.check_clean()
