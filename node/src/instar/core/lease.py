"""How long a trial may last, reckoned over boots. Pure. The launcher needs it, and nothing else of a trial."""

from __future__ import annotations

from instar.core.light import dataclass, replace


@dataclass(frozen=True, slots=True)
class Lease:
    """Boot time, in seconds: `spent_s` before `since` of the boot `boot_id`, counting on from there."""

    lease_s: float
    cap_s: float
    boot_id: str
    since: float
    spent_s: float = 0.0

    def spent(self, boot_id: str, boottime: float) -> float:
        """Seconds used up. In another boot, time since the last mark is not known and does not count, and
        neither does the boot itself: the launcher marks the lease when it starts the release there, and
        its count of attempts bounds the boots."""
        if boot_id == self.boot_id:
            return self.spent_s + max(0.0, boottime - self.since)
        return self.spent_s

    def marked(self, boot_id: str, boottime: float) -> Lease:
        """The same lease, reckoned from now on in this boot."""
        return replace(self, boot_id=boot_id, since=boottime, spent_s=self.spent(boot_id, boottime))
