"""Choose the release to run, count the start if it is on trial, and become it.

`launch agent|updater --state DIR [OPTION …]` is what service managers start; the options are the role's. It
runs from the oldest copy of Instar on the node, so it is older than whatever is on trial.

Import diet: bare standard library, `core` and `host`; no ssl, no asyncio, no argparse, and, since
no agent answers until it is through: no dataclasses, no typing, no signal (tests/node/test_launch_diet.py).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from instar.core.errors import InputError, InstarError, MachineError
from instar.core.light import replace
from instar.core.reason import Reason
from instar.host import processes, trials
from instar.host.clock import Clock
from instar.host.files import make_folder
from instar.host.interpreter import command
from instar.host.layout import LINES, Layout
from instar.host.line import Line
from instar.host.locks import RoleLock
from instar.host.points import reach

LOCK_WAIT_S = 10.0
MOST_STARTS, STARTS_S = 5, 600.0  # so often within that time without a welcome: the beacon calls first
BEACON_S = 30.0
FORK_S = 0.05  # a child that is not past its exec yet holds its parent's lock, though the parent is gone


def choose(line: Line, clock: Clock) -> str:
    """The release to run now. May count an attempt, end a trial, or repair `current`; each is durable.

    Raises MachineError `no-release` when no valid release is on the disk.
    """
    lock = line.lock()
    try:
        lock.acquire(LOCK_WAIT_S)
    except FileNotFoundError:  # the whole line was deleted
        make_folder(line.layout.releases)
        lock.acquire(LOCK_WAIT_S)
    with lock:
        trial, current = trials.read(line), line.current()
        sound = line.is_valid(current)  # asked once: it reads and hashes the whole release
        if trial is not None and trial.release == current and not trial.confirmed:
            reason = trial.undone or _why_not_again(trial, sound, clock)
            if reason is None:
                lease = trial.lease.marked(clock.boot_id(), clock.boottime())
                trials.write(line, replace(trial, attempts=trial.attempts + 1, lease=lease))
                reach("launch:counted")
            else:  # also when a kill came between the reason and the link
                trials.undo(line, trial, reason)
                current = line.current()
                sound = line.is_valid(current)
        return current if sound else _repair(line, current)


def _why_not_again(trial: trials.Trial, sound: bool, clock: Clock) -> Reason | None:
    if trial.attempts >= trial.max_attempts:
        return Reason("attempts-used-up", f"it was started {trial.attempts} times and did not stay up")
    if why := trials.lapsed(trial, clock):
        return Reason("lease-lapsed", why)
    if not sound:
        return Reason("release-damaged", "its files are not what was signed")
    return None


def _repair(line: Line, current: str) -> str:
    """The best of what is left: previous, else the newest valid one. As a last resort that may be one
    that was verified but never rehearsed: signed code that runs is worth more than none."""
    others = [name for name in reversed(line.names()) if name != current]
    for name in (line.previous(), *others):
        if line.is_valid(name):
            line.activate(name, fallback="")
            return name
    raise MachineError("no-release", f"cannot start: no valid release in {line.layout.releases}")


def become(layout: Layout, role: str, clock: Clock, options: list[str]) -> None:
    """Replace this process by the chosen release of `role`. Does not return; raises InstarError."""
    with RoleLock(layout.role_lock(role)) as lock:
        try:
            lock.acquire(FORK_S)
        except MachineError:
            text = f"cannot start: another process is this node's {role}"
            raise MachineError("already-running", text) from None
    line = Line(layout.line(role))
    line, release = (
        (line, _for_agent(layout, line, clock)) if role == "agent" else _for_updater(layout, clock)
    )
    processes.record(layout.process(role), processes.this_process(clock.boot_id(), release))
    reach(f"launch:{role}:recorded")
    words = command(line.program(release), role, "--state", str(layout.state), *options)
    os.execv(words[0], words)


def _for_updater(layout: Layout, clock: Clock) -> tuple[Line, str]:
    """The line and the release to run. Both lines hold the same program: where the updater's has no valid
    one left, the agent's does its work, and brings the other back."""
    line, other = Line(layout.line("updater")), Line(layout.line("agent"))
    try:
        return line, choose(line, clock)
    except MachineError as error:
        if error.code != "no-release" or not other.is_valid(other.current()):
            raise
    return other, other.current()


def _for_agent(layout: Layout, line: Line, clock: Clock) -> str:
    """The release to run, by the help of the beacon where there is none, or none that the server ever heard
    of though it was started MOST_STARTS times within STARTS_S."""
    wait_s = BEACON_S if len(_starts(layout, line.current(), clock)) >= MOST_STARTS else None
    try:
        if wait_s is None:
            release = choose(line, clock)
            _count(layout, release, clock)
            return release
    except MachineError as error:
        if error.code != "no-release":
            raise
        print(f"instar launch: {error}; calling the server for help", file=sys.stderr, flush=True)
    from instar.recovery.beacon import serve

    release = serve(layout, clock, lambda: choose(line, clock), wait_s)
    _count(layout, release, clock)
    return release


def _starts(layout: Layout, release: str, clock: Clock) -> list[float]:
    """When `release` was started of late, in boot time. The agent removes the file at its welcome."""
    now = clock.boottime()
    try:
        said, _, times = layout.starts.read_text().partition("\n")
        earlier = [float(time) for time in times.split()] if said == f"{release} {clock.boot_id()}" else []
    except (OSError, ValueError):
        return []
    return [time for time in earlier if 0 <= now - time < STARTS_S]


def _count(layout: Layout, release: str, clock: Clock) -> None:
    """Not synced, and a full disk must not keep a node from starting: it is a hint, of this boot alone."""
    times = [*_starts(layout, release, clock), clock.boottime()][-MOST_STARTS:]
    try:
        layout.starts.write_text(f"{release} {clock.boot_id()}\n{' '.join(map(str, times))}\n")
    except OSError:
        return


def main(argv: list[str]) -> int:
    """`launch ROLE --state DIR [OPTION …]`."""
    try:
        odd = argv[3:4] and not argv[3].startswith("--")
        if len(argv) < 3 or argv[0] not in LINES or argv[1] != "--state" or odd:
            raise InputError("usage", "usage: instar launch agent|updater --state DIR [OPTION …]")
        become(Layout(Path(argv[2])), argv[0], Clock(), argv[3:])
    except (InstarError, OSError) as error:
        print(f"instar launch: {error}", file=sys.stderr, flush=True)
        return getattr(error, "exit_status", 4)
    return 0
