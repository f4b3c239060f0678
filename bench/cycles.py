"""Figures of the update test tool: seconds for each update, and how long the agent is away, in every mode (M6)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.figures import Figure
from instar.core.errors import MachineError
from instar_lab.container import SYSTEMD, Container, made_tree, why_not
from instar_lab.updatetest import inside
from instar_lab.updatetest.options import MODES

START_S, CYCLE_S = 60.0, 10.0  # bounds of a run: with the server's start, and for each update
AIM_S, AIM_GAP_MS = 2.0, 200.0
# MeshCentral's agent in the hands of its update-test.js, and its time away.
SERVICE_S = {"native": {"MeshAgent": 44.0}, "recovery": {"MeshAgent": 0.76}}
SERVICE_GAP_MS = {"native": {"MeshAgent": 3740.0}, "recovery": {"MeshAgent": 539.0}}
BY_HAND_GAP_MS = {"native": {"MeshAgent": 222.0}}


def measure(count: int) -> list[Figure]:
    """`count` updates in each mode, to and from builds of their own."""
    figures = []
    for mode in MODES:
        figures += of(f"update test, {mode}, by hand", by_hand(mode, count), {}, BY_HAND_GAP_MS.get(mode, {}))
    return figures + under_systemd(count)


def by_hand(mode: str, count: int) -> list[dict[str, Any]]:
    words = [sys.executable, "-m", "instar_lab.main", "update-test", "--json", *options(mode, count)]
    bound_s = START_S + CYCLE_S * count
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=bound_s, check=False)
    except subprocess.TimeoutExpired:
        raise MachineError("too-late", f"cannot time updates: no end within {bound_s:g} s") from None
    return told(mode, done)


def under_systemd(count: int) -> list[Figure]:
    """The same in a container with a systemd of its own. Nothing where no container can be had at once."""
    cache = Path(os.environ.get("INSTAR_OS_CACHE") or Path(tempfile.gettempdir()) / "instar-os-cache")
    tree = made_tree(cache, SYSTEMD)
    if tree is None or why_not(cache, SYSTEMD):
        print("no figures of updates under systemd: 'make test-os' makes what they need", file=sys.stderr)
        return []
    figures = []
    with (
        tempfile.TemporaryDirectory(prefix="ibc-") as folder,
        Container(tree, Path(folder), shown=inside.shown()) as box,
    ):
        for mode in MODES:
            done = inside.run(box, *options(mode, count), within_s=START_S + CYCLE_S * count)
            name, lines = f"update test, {mode}, systemd", told(mode, done)
            figures += of(name, lines, SERVICE_S.get(mode, {}), SERVICE_GAP_MS.get(mode, {}))
    return figures


def options(mode: str, count: int) -> tuple[str, ...]:
    return ("--mode", mode, "--count", str(count))


def told(mode: str, done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """What it said. Raises MachineError when it did not end well."""
    if done.returncode != 0:
        raise MachineError("command-failed", f"cannot time {mode} updates: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def of(
    name: str, lines: list[dict[str, Any]], others_s: dict[str, float], others_ms: dict[str, float]
) -> list[Figure]:
    done = [line for line in lines if line["event"] == "done"]
    seconds = tuple(line["confirmed_s"] for line in done)
    gaps = tuple(line["gap_s"] * 1000 for line in done)
    return [
        Figure(f"{name}: an update", "s", seconds, AIM_S, others_s),
        Figure(f"{name}: update gap", "ms", gaps, AIM_GAP_MS, others_ms),
    ]
