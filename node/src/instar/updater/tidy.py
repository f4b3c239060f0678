"""What the updater puts in order when it starts: things that belong to no open transaction.

They are there only after a fault of the disk (a journal that could not be read was set aside): a kill
or a power cut alone leaves none, since a journal outlives what it describes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from instar.core.journal import Reason
from instar.engine.journal import Journals
from instar.host import trials
from instar.host.files import remove_tree
from instar.host.layout import Layout
from instar.targets.release import LOCK_WAIT_S, ReleaseTarget

log = logging.getLogger("instar.updater")


def tidy(layout: Layout, journals: Journals, targets: Mapping[str, ReleaseTarget]) -> None:
    """Idempotent. Raises HandOver when this process must become another release."""
    known = {journal.progress.begin.tx for journal in journals.unfinished()}
    for target in targets.values():
        _orphaned_trial(target, known)
    if layout.staging.is_dir():
        for path in layout.staging.iterdir():
            if path.name not in known:
                log.info("removing %s, which no transaction owns", path)
                remove_tree(path)


def _orphaned_trial(target: ReleaseTarget, known: set[str]) -> None:
    """A trial without its journal was never confirmed: the release before it is put back."""
    trial = trials.read(target.line)
    if trial is None or trial.tx in known:
        return
    lock = target.line.lock()
    lock.acquire(LOCK_WAIT_S)
    with lock:
        if not trial.confirmed:
            log.warning("%s: trial %s has no journal; putting %s back", target.role, trial.tx, trial.previous)
            trials.undo(target.line, trial, Reason("journal-lost", "its journal could not be read"))
    target.bring_up(target.line.current())
    target.line.end_trial()
