"""What the updater puts in order when it starts: things that belong to no open transaction.

They are there only after a fault of the disk (a journal that could not be read was set aside): a kill
or a power cut alone leaves none, since a journal outlives what it describes.
"""

from __future__ import annotations

import logging

from instar.core.errors import InstarError
from instar.core.journal import Reason
from instar.engine.journal import Journals
from instar.host import trials
from instar.host.files import remove_tree
from instar.host.layout import Layout
from instar.targets.line import LOCK_WAIT_S, LineTarget
from instar.updater.targets import Targets

log = logging.getLogger("instar.updater")


def tidy(layout: Layout, journals: Journals, targets: Targets) -> None:
    """Idempotent. Raises HandOver when this process must become another release."""
    open_now = [journal.progress.begin for journal in journals.unfinished()]
    known = {begin.tx for begin in open_now}
    for target in targets.programs():
        _orphaned_trial(target, known)
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
