"""A system on trial whose updater runs, and cannot open the slots: its image does not mount the EFI system partition,
or calls the disk by another name.

Nobody can judge it then, nor choose another. But the firmware was asked for one try of it, so one more start is the
old system's, which puts it back. Until its lease is spent no other line begins, as in any trial; then the machine is
restarted, at most MOST times for one transaction. After that it is left alone: the repair may come by another line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from instar.core.journal import Progress, Reason
from instar.core.lease import Lease
from instar.core.light import asdict
from instar.core.transaction import State
from instar.engine.journal import Journal
from instar.engine.target import NotNow
from instar.host.clock import Clock

MOST = 3
DOWN_WITHIN_S = 300.0  # a machine that is not down by then does not go down

log = logging.getLogger("instar.updater")


def is_held(progress: Progress, clock: Clock) -> bool:
    """Whether it is on trial in this boot, after a switch."""
    activated = progress.data.get("activated")
    if progress.state is not State.TRIAL or not activated or "lease" not in progress.data:
        return False
    return bool(activated["mode"] != "none" and activated["boot_id"] != clock.boot_id())


def hold(journal: Journal, clock: Clock, why: Reason, reboot: Callable[[], None]) -> None:
    """Returns when it is to be left alone. Raises NotNow while nothing else may begin, and MachineError where the
    machine cannot be restarted."""
    if not is_held(journal.progress, clock):
        return
    lease, now = Lease(**journal.progress.data["lease"]), clock.boot_id()
    if lease.boot_id != now:  # the way down and up again does not count
        lease = Lease(lease.lease_s, lease.cap_s, now, clock.boottime())
        journal.note({"lease": asdict(lease)})
    if lease.spent(now, clock.boottime()) < lease.lease_s:
        raise NotNow(why)
    sent = dict(journal.progress.data.get("unopened", {}))
    if sent.get("boot_id") != now:
        sent = {"boot_id": now, "at": clock.boottime(), "times": int(sent.get("times", 0)) + 1}
        if sent["times"] <= MOST:
            text = f"the slots cannot be opened within {lease.lease_s:g} s ({why.text}): starting anew"
            journal.note({"unopened": sent}, Reason(why.code, text))
    if sent["times"] > MOST or clock.boottime() > sent["at"] + DOWN_WITHIN_S:
        return
    log.warning("os: %s; restarting", why.text)
    reboot()
    raise NotNow(Reason("not-down", "the machine is to go down, since its slots cannot be opened"))
