"""Figures of the update test tool: seconds for each update, and how long the agent is away, in every mode (M6)."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from bench.figures import Figure
from instar.core.errors import MachineError
from instar_lab.updatetest.options import MODES

START_S, CYCLE_S = 60.0, 10.0  # bounds of a run: with the server's start, and for each update
AIM_S, AIM_GAP_MS = 2.0, 200.0
# MeshCentral's update-test.js: seconds per cycle of its agent as a service. Its time away, by hand where it is so.
PEER_S = {"native": {"MeshAgent as a service": 44.0}, "recovery": {"MeshAgent as a service": 0.76}}
PEER_GAP_MS = {"native": {"MeshAgent": 222.0}, "recovery": {"MeshAgent as a service": 539.0}}


def measure(count: int) -> list[Figure]:
    """`count` updates in each mode, to and from builds of their own, by hand."""
    figures = []
    for mode in MODES:
        done = [line for line in run(mode, count) if line["event"] == "done"]
        seconds = tuple(line["confirmed_s"] for line in done)
        gaps = tuple(line["gap_s"] * 1000 for line in done)
        figures += [
            Figure(f"update test, {mode}: an update", "s", seconds, AIM_S, PEER_S.get(mode, {})),
            Figure(f"update test, {mode}: update gap", "ms", gaps, AIM_GAP_MS, PEER_GAP_MS.get(mode, {})),
        ]
    return figures


def run(mode: str, count: int) -> list[dict[str, Any]]:
    """What the tool said. Raises MachineError when it did not end well."""
    words = [
        sys.executable,
        "-m",
        "instar_lab.main",
        "update-test",
        "--json",
        "--mode",
        mode,
        "--count",
        str(count),
    ]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=START_S + CYCLE_S * count, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise MachineError("too-late", f"cannot time updates: no end within {error.timeout:g} s") from None
    if done.returncode != 0:
        raise MachineError("command-failed", f"cannot time {mode} updates: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]
