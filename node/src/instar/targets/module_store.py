"""What of a module is kept on the disk, and for how long.

    releases    current, previous, the newest two, and whatever was used within a day; of a module without
                a `current`, nothing once it was not used for 30 days
    data/       while the module is wanted, and for 30 days of this machine's own running after it no
                longer was. Wall time would do for what can be fetched again, but not here: a clock that
                jumps ahead for a moment must not cost what a module has kept
    incoming/   a fetch that was cut off, for a day

`retired.json` is written before a module's links go, so that a kill in between is finished at the next
round: {"v", "release", "wall", "told", "lease": {…}}; `told` once the agent has heard of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from instar.core.lease import Lease
from instar.host.files import Disk, remove, remove_tree, write_atomic
from instar.host.layout import ModuleLayout
from instar.host.line import VALID, Line
from instar.host.locks import RoleLock
from instar.host.points import reach
from instar.targets.kit import Kit

DAY_S = 86_400.0
UNUSED_S = 30 * DAY_S
NEWEST = 2
TOUCH_EVERY_S = 3600.0
MARK_EVERY_S = 3600.0

log = logging.getLogger("instar.updater")


# --- releases


def mark_used(folder: Path, now: float) -> None:
    """Say that a release is in use, at most once an hour. Failing to say so is no error."""
    with contextlib.suppress(OSError):
        if abs(now - folder.stat().st_mtime) >= TOUCH_EVERY_S:
            os.utime(folder, (now, now))


def collect(line: Line, layout: ModuleLayout, now: float) -> list[str]:
    """Remove the releases that need not be kept; says which. Whoever calls holds the line's lock.

    `now` is wall time: what is removed can be fetched again.
    """
    names = line.names()
    linked = {line.current(), line.previous()} - {""}
    recent = {name for name in names if now - _used(line.folder(name)) < DAY_S}
    unused = not linked and all(now - _used(path) >= UNUSED_S for path in _traces(line, layout, names))
    whole = [name for name in names if (line.folder(name) / VALID).exists()]
    newest = set() if unused else set(whole[-NEWEST:])
    gone = [name for name in names if name not in linked | recent | newest]
    for name in gone:
        line.remove_release(name)
    return gone


def _traces(line: Line, layout: ModuleLayout, names: list[str]) -> list[Path]:
    return [layout.used, *(line.folder(name) for name in names)]


def _used(path: Path) -> float:
    """When it was last used; 0 for what is not there. A time in the future is no use of it: see `collect`."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


# --- the end of a module


@dataclass(frozen=True, slots=True)
class Retirement:
    release: str  # what ran last
    wall: float  # unix time, for people
    told: bool  # the agent knows
    lease: Lease  # how long the data has waited


def retirement(layout: ModuleLayout) -> Retirement | None:
    """None without a record. One that cannot be read counts as not told, from now on: unsure means keep."""
    try:
        said = json.loads(layout.retired.read_bytes())
        lease = {name: said["lease"][name] for name in ("boot_id", "since", "spent_s")}
        since, spent_s = float(lease["since"]), float(lease["spent_s"])
        waited = Lease(UNUSED_S, UNUSED_S, str(lease["boot_id"]), since, spent_s)
        return Retirement(str(said["release"]), float(said["wall"]), bool(said["told"]), waited)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return Retirement("", 0.0, False, Lease(UNUSED_S, UNUSED_S, "", 0.0))


def note_retirement(layout: ModuleLayout, release: str, kit: Kit, told: bool) -> None:
    """Write that the module is not wanted any more; its data waits from now on."""
    clock = kit.clock
    lease = Lease(UNUSED_S, UNUSED_S, clock.boot_id(), clock.boottime())
    _write(layout, Retirement(release, clock.wall(), told, lease), kit.disk)


def forget_retirement(layout: ModuleLayout, disk: Disk) -> None:
    """It is wanted again."""
    remove(layout.retired, disk)


def retire(line: Line, layout: ModuleLayout, kit: Kit, tell: Callable[[], None], wait_s: float) -> None:
    """End a module that is no longer wanted, or go on with that. Idempotent; a kill anywhere is finished by
    doing it again. `tell` lets the agent know, and raises InstarError while it cannot."""
    current, found = line.current(), retirement(layout)
    if found is None or (found.told and current):
        note_retirement(layout, current, kit, told=False)
    reach("retire:noted")
    lock = line.lock()
    lock.acquire(wait_s)
    with lock:
        line.deactivate()
    reach("retire:unlinked")
    found = retirement(layout)
    if found is not None and not found.told:
        tell()
        reach("retire:told")
    lock.acquire(wait_s)
    with lock:
        for name in line.names():
            if kit.clock.wall() - _used(line.folder(name)) >= DAY_S or name == (found and found.release):
                line.remove_release(name)
    reach("retire:collected")
    if found is not None and not found.told:  # last: who is told is not asked for again
        _write(layout, replace(found, told=True), kit.disk)


def sweep(line: Line, layout: ModuleLayout, kit: Kit) -> None:
    """What is done from time to time: what is not used goes, and the data of the retired after its wait."""
    _sweep_incoming(layout, kit)
    lock = line.lock()
    if not lock.try_acquire():
        return  # somebody works on it: next time
    with lock:
        for name in collect(line, layout, kit.clock.wall()):
            log.info("module %s: removed %s, which nobody used", layout.folder.name, name)
        found = retirement(layout)
        if found is None or line.current():
            return
        _wait_on(layout, found, kit)


def _wait_on(layout: ModuleLayout, found: Retirement, kit: Kit) -> None:
    boot_id, now = kit.clock.boot_id(), kit.clock.boottime()
    spent_s = found.lease.spent(boot_id, now)
    if spent_s >= UNUSED_S:
        log.info("module %s: removing its data, 30 days after it was retired", layout.folder.name)
        remove_tree(layout.data, kit.disk)
        remove(layout.retired, kit.disk)
    elif found.lease.boot_id != boot_id or now - found.lease.since >= MARK_EVERY_S:
        _write(layout, replace(found, lease=found.lease.marked(boot_id, now)), kit.disk)


def _sweep_incoming(layout: ModuleLayout, kit: Kit) -> None:
    if not layout.incoming.is_dir():
        return
    lock = RoleLock(layout.fetching)
    if not lock.try_acquire():
        return
    with lock:
        for path in layout.incoming.iterdir():
            if kit.clock.wall() - _used(path) >= DAY_S:
                remove(path, kit.disk)


def _write(layout: ModuleLayout, found: Retirement, disk: Disk) -> None:
    lease = asdict(found.lease)
    body: dict[str, Any] = {"v": 1, "release": found.release, "wall": found.wall, "told": found.told}
    write_atomic(layout.retired, json.dumps({**body, "lease": lease}).encode(), 0o600, disk)
