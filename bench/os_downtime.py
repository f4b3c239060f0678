"""How long a machine is away for another system: by kexec and by a reboot, by turns, in the same virtual machine.

By what the server sees: from the last heartbeat of the system that goes to the hello of the one that comes. The
node's heartbeats come every PING_S, so that much is what a single time is worth. The machine is QEMU without
hardware acceleration, with real firmware (OVMF): both figures are long, what counts is one by the other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.figures import Figure
from instar.core.errors import MachineError, ServerUnreachable
from instar_lab import machine as processes
from instar_lab.osimage import packages

if TYPE_CHECKING:
    from tests.os.vm.world import Machine

PING_S, LOOK_S = 1.0, 0.05
AWAY_S = 400.0
UP = "LAB up "  # what the next system says first
SETTINGS = f"look_floor_s = 0.2\nping_s = {PING_S}\n"
MODES = ("kexec", "reboot")


def measure(times: int) -> list[Figure]:
    """`times` updates in each mode. Raises MachineError where no virtual machine can be had, or an update fails."""
    if missing := packages.missing():
        raise MachineError("no-packages", f"they need the packages {' '.join(missing)}")
    away: dict[str, list[float]] = {mode: [] for mode in MODES}
    with running() as (machine, bundles):
        for version, bundle in bundles:
            mode = MODES[sum(map(len, away.values())) % len(MODES)]
            away[mode].append(update(machine, version, bundle, mode))
            if all(len(seconds) >= times for seconds in away.values()):
                break
    ratios = tuple(kexec / reboot for kexec, reboot in zip(away["kexec"], away["reboot"], strict=True))
    return [
        *(
            Figure(f"node away for another system, by {mode}, in QEMU", "s", tuple(away[mode]))
            for mode in MODES
        ),
        Figure("node away: by kexec by that of a reboot, by turns", "×", ratios, 1.0),
    ]


@contextmanager
def running() -> Iterator[tuple[Machine, Iterator[tuple[str, str]]]]:
    """A machine that runs the first of three systems; and the bundles of the others, over and over."""
    from tests.os.vm.world import World, X, Y, Z

    world = World(Path(tempfile.mkdtemp(prefix="ibv-", dir="/tmp")), SETTINGS)
    try:
        world.open()
        bundles = cycle([(version, world.publish(world.image(version))) for version in (Y, Z, X)])
        machine = world.machine(world.image(X))
        try:
            machine.start()
            yield machine, bundles
        finally:
            machine.close()
    finally:
        world.close()


def update(machine: Machine, version: str, bundle: str, mode: str) -> float:
    """Seconds. What the firmware has not started yet may be left again: it is a bench."""
    order = machine.update_os(bundle, mode, override_cold_boot=True)
    seconds = time_away(machine)
    machine.up(version, "kexec" if mode == "kexec" else "firmware")
    ended = machine.ended(order)
    if not ended["outcome"].startswith("confirmed"):
        raise MachineError("not-confirmed", f"cannot time an update by {mode}: it ended {ended}")
    return seconds


def time_away(machine: Machine) -> float:
    """From the last heartbeat before the next system is up to the first hello after.

    A connection that breaks before belongs to the old system: it is busy with its update.
    """
    last, old, is_up = 0.0, set[float](), False

    def back() -> float | None:
        nonlocal last, is_up
        try:
            seen = node(machine)
        except ServerUnreachable:
            return None
        if not is_up:
            last = max(last, seen["last_seen"] or 0.0)
            old.add(seen["connected_since"])
            is_up = any(UP in line for line in machine.vm.lines(machine.since))
            return None
        since = seen["connected_since"]
        return None if since is None or since in old else float(since)

    return processes.wait_for(back, "the node to come back", AWAY_S, machine.words, every_s=LOOK_S) - last


def node(machine: Machine) -> dict[str, Any]:
    return dict(machine.world.server.api.get(f"/nodes/{machine.id}"))
