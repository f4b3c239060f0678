"""What the updater puts in order: things that belong to no open transaction.

Trials and staging folders are left only by a fault of the disk (a journal that could not be read was set
aside): a kill or a power cut alone leaves none, since a journal outlives what it describes. Parcels stay
until their transaction has ended, and at most for a day.
"""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path

from instar.core.errors import InstarError
from instar.core.journal import Progress, Reason
from instar.core.wish import Wanted, Wish
from instar.engine.journal import Journals
from instar.host import trials
from instar.host.clock import Clock
from instar.host.files import remove_tree
from instar.host.incoming import COMPLETE, DAY_S, Incoming, Parcel
from instar.host.layout import Layout
from instar.targets.line import LOCK_WAIT_S, LineTarget
from instar.updater.orders import Orders
from instar.updater.targets import Targets

GRACE_S = 900.0  # for a parcel that came while its release was under way, to be of use

log = logging.getLogger("instar.updater")


def tidy(layout: Layout, journals: Journals, targets: Targets) -> None:
    """Idempotent. Raises HandOver when this process must become another release."""
    open_now = [journal.progress.begin for journal in journals.unfinished()]
    known = {begin.tx for begin in open_now}
    for target in targets.programs():
        _orphaned_trial(target, known)
    incoming = Incoming(layout.incoming)
    for parcel in incoming.complete():
        if parcel.digest not in {begin.digest for begin in open_now}:
            incoming.release(parcel)
    if layout.staging.is_dir():
        for path in layout.staging.iterdir():
            if path.name not in known:
                log.info("removing %s, which no transaction owns", path)
                remove_tree(path)
    for module in targets.modules():
        try:  # one module's trouble is its own
            _orphaned_trial(module, known)
            if module.role not in {begin.line for begin in open_now}:
                module.sweep()
        except (InstarError, OSError) as error:
            log.warning("%s cannot be put in order: %s", module.role, error)


def tidy_parcels(
    layout: Layout, clock: Clock, journals: Journals, wanted: Wanted, targets: Targets, orders: Orders
) -> None:
    """Remove parcels that no transaction needs any more, or that are older than a day.

    One is needed while a transaction for its release is open, or a wish for it waits to be fulfilled. One that
    came after the last transaction for its release had begun may be for the next: it is given GRACE_S for that,
    and while none has ended since, a day. Nothing is looked at while an operator pushes another.
    """
    with orders.idle() as idle:
        if not idle or not layout.incoming.is_dir():
            return
        progresses = [journal.progress for journal in journals.read_all()]
        needed = {p.begin.digest for p in progresses if not p.finished}
        needed |= {w.release.digest for w in wanted.wishes if _waits(w, targets)}
        incoming = Incoming(layout.incoming, clock=clock)
        for parcel in incoming.complete():
            if parcel.kind != "node" or parcel.digest in needed:
                continue
            if _is_used_up(parcel, [p for p in progresses if p.begin.digest == parcel.digest], clock.wall()):
                log.info("removing the parcel of %s, which is used up", parcel.version)
                incoming.remove(parcel)
        incoming.sweep(needed, clock.wall())
        _drop_old(layout.rescue, clock.wall())


def _is_used_up(parcel: Parcel, its: list[Progress], now_wall: float) -> bool:
    """By the transactions of its release, which have all ended. One that was under way when it came may have gone
    without it."""
    came = _came(parcel)
    used = any(progress.began.wall > came for progress in its)
    ended = any(progress.changed is not None and progress.changed.wall > came for progress in its)
    return used or (ended and now_wall - came > GRACE_S)


def _drop_old(folder: Path, now_wall: float) -> None:
    """What a recovery core has left that was killed and never came again."""
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # a core works there at this very moment
            if now_wall - path.lstat().st_mtime > DAY_S:
                remove_tree(path)


def _waits(wish: Wish, targets: Targets) -> bool:
    return targets.of(wish.line).line.current() != wish.release.name


def _came(parcel: Parcel) -> float:
    """Unix time."""
    try:
        return (parcel.folder / COMPLETE).stat().st_mtime
    except OSError:
        return math.inf


def _orphaned_trial(target: LineTarget, known: set[str]) -> None:
    """A trial without its journal was never confirmed: the release before it is put back."""
    trial = trials.read(target.line)
    if trial is None or trial.tx in known:
        return
    lock = target.line.lock()
    lock.acquire(LOCK_WAIT_S)
    with lock:
        if not trial.confirmed:
            before = trial.previous or "nothing"
            log.warning("%s: trial %s has no journal; putting %s back", target.role, trial.tx, before)
            target.undo_orphan(trial, Reason("journal-lost", "its journal could not be read"))
    target.bring_back(target.line.current())
    target.line.end_trial()
