"""The trial's record: who may end a trial, and how. Shared by the launcher, the guards and the updater.

    trial.json  {"v", "tx", "release", "previous", "attempts", "max_attempts", "lease": {...},
                 "undone": {"code", "text"}?, "confirmed": true?}

Two ends are possible, `confirmed` and `undone`. Whoever writes one of them first, holding the line's
lock, wins; the other side finds it written and follows. So old and new never race for the outcome.
"""

from __future__ import annotations

from instar.core.lease import Lease
from instar.core.light import asdict, dataclass, replace
from instar.core.reason import Reason
from instar.host.clock import Clock
from instar.host.line import Line
from instar.host.points import reach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


@dataclass(frozen=True, slots=True)
class Trial:
    """A release on trial. `attempts` counts its starts, by the launcher, before each."""

    tx: str
    release: str
    previous: str
    max_attempts: int
    lease: Lease
    attempts: int = 0
    undone: Reason | None = None
    confirmed: bool = False

    @property
    def open(self) -> bool:
        return self.undone is None and not self.confirmed


def read(line: Line) -> Trial | None:
    """The line's trial; None without one. One that cannot be read is set aside: no trial, current stays."""
    record = line.trial()
    if record is None:
        return None
    try:
        undone = record.get("undone")
        return Trial(
            tx=str(record["tx"]),
            release=str(record["release"]),
            previous=str(record["previous"]),
            max_attempts=int(record["max_attempts"]),
            lease=_lease(record["lease"]),
            attempts=int(record["attempts"]),
            undone=Reason(str(undone["code"]), str(undone["text"])) if undone else None,
            confirmed=bool(record.get("confirmed", False)),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        line.set_trial_aside()
        return None


def _lease(fields: dict[str, Any]) -> Lease:
    """Every field in its type: the launcher reckons with them, and nothing may stop a start."""
    times = (float(fields[name]) for name in ("lease_s", "cap_s", "since", "spent_s"))
    lease_s, cap_s, since, spent_s = times
    return Lease(lease_s, cap_s, str(fields["boot_id"]), since, spent_s)


def write(line: Line, trial: Trial) -> None:
    fields: dict[str, Any] = asdict(trial)
    line.write_trial(fields)


def undo(line: Line, trial: Trial, reason: Reason) -> None:
    """Put the previous release back, for `reason`. The caller holds the line's lock.

    The reason is on the disk before the link moves: a kill between the two is finished by the
    next launch, which finds `undone` and a `current` that does not fit.
    """
    if trial.undone is None:
        write(line, replace(trial, undone=reason))
    reach("undo:written")
    if line.current() == trial.release and line.is_valid(trial.previous):
        line.activate(trial.previous, fallback="")
    reach("undo:flipped")


def lapsed(trial: Trial, clock: Clock) -> str:
    """Why this open trial is over by itself, in words; '' while it is not.

    The updater judges at the lease and at the cap, and says whether the network is at fault. Only when
    it has done neither for a while beyond the cap, since it is slow, gone or itself on trial, is it over.
    """
    spent, cap_s = trial.lease.spent(clock.boot_id(), clock.boottime()), trial.lease.cap_s
    if spent < cap_s + min(60.0, cap_s / 4):
        return ""
    return f"nobody judged it within {spent:.0f} s"
