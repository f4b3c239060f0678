"""End a trial whose lease is over, when the one on trial cannot or will not.

`guard ROLE --state DIR` runs from the launcher's copy. Each line's watcher runs it for the other line:
the agent for the updater, the updater (and the keeper) for the agent. It needs no help of the patient.
"""

from __future__ import annotations

import sys
from pathlib import Path

from instar.core.errors import InputError, InstarError, MachineError
from instar.core.reason import Reason
from instar.host import processes, trials
from instar.host.clock import Clock
from instar.host.layout import LINES, Layout
from instar.host.line import Line
from instar.host.services import GRACE_S, Services, services_of

LOCK_WAIT_S = 10.0


def guard(layout: Layout, role: str, clock: Clock, services: Services) -> str:
    """Put the previous release back if the trial of `role` has lapsed. Idempotent.

    Returns why it was undone; '' when there was nothing to do. The process on trial is ended, and the
    previous release is being started when this returns.
    """
    line = Line(layout.line(role))
    lock = line.lock()
    try:
        lock.acquire(LOCK_WAIT_S)
    except MachineError:
        if not _end_hung(layout, line, role, clock):
            raise
        lock.acquire(LOCK_WAIT_S)
    with lock:
        trial = trials.read(line)
        if trial is None or trial.confirmed:
            return ""
        active = trial.release == line.current()
        why = trial.undone.text if trial.undone else trials.lapsed(trial, clock) if active else ""
        if not why:
            return ""
        trials.undo(line, trial, Reason("lease-lapsed", why))
        moved = active and line.current() != trial.release
    process = processes.recorded(layout.process(role))
    ended = "gone"
    if process is not None and process.release == trial.release != line.current():
        ended = processes.stop(
            process, clock.boot_id(), GRACE_S
        )  # also if a kill came right before, last time
    if not moved and ended == "gone":
        return ""
    services.start(role)  # one that ended with status 0 is not started again by systemd
    return why


def _end_hung(layout: Layout, line: Line, role: str, clock: Clock) -> bool:
    """End the process on trial where its lease is over: it may be what holds the line's lock, and hang with it."""
    trial = trials.read(line)
    if trial is None or trial.confirmed or trial.release != line.current() or not trials.lapsed(trial, clock):
        return False
    process = processes.recorded(layout.process(role))
    if process is None or process.release != trial.release:
        return False
    processes.stop(process, clock.boot_id(), GRACE_S)
    return True


def main(argv: list[str]) -> int:
    try:
        if len(argv) != 3 or argv[0] not in LINES or argv[1] != "--state":
            raise InputError("usage", "usage: instar guard agent|updater --state DIR")
        layout, clock = Layout(Path(argv[2])), Clock()
        why = guard(layout, argv[0], clock, services_of(layout, clock))
    except (InstarError, OSError) as error:
        print(f"instar guard: {error}", file=sys.stderr, flush=True)
        return getattr(error, "exit_status", 4)
    if why:
        print(f"instar guard: put the previous {argv[0]} back: {why}", file=sys.stderr, flush=True)
    return 0
