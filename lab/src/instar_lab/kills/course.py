"""What a ward goes through while it is killed, in general.

A course is made for each row. It brings the ward to where it begins, sets one thing going, says when that has
come to its end, and then what is not as it must be.
"""

from __future__ import annotations

from instar.host.line import Line as Store
from instar_lab import machine
from instar_lab.kills.modules import BETTER, GOOD, MEMORY
from instar_lab.kills.ward import Ward

BEGUN_S = 60.0


class Course:
    """`about` is for the table's heading."""

    name = about = ""

    def __init__(self, ward: Ward) -> None:
        self.ward = ward

    def prepare(self) -> None:
        """Bring the ward to where it begins; nothing is killed meanwhile. Raises InstarError."""

    def begin(self) -> None:
        """Set it going."""
        raise NotImplementedError

    def ended(self) -> bool:
        """Whether it came to an end, so far as can be seen now."""
        raise NotImplementedError

    def fault(self) -> str:
        """What is wrong now that it has ended; '' for nothing. Asked again for a while."""
        return ""

    def last(self) -> str:
        """What is wrong for good, asked once at the very end."""
        return self.ward.remembers() if self.ward.memory.current() else ""

    def outcome(self) -> str:
        raise NotImplementedError

    def runs(self, version: str) -> None:
        """See that the service module runs, in any good version if none is named ('')."""
        has = version_of(self.ward.memory.current())
        if has in ((GOOD, BETTER) if not version else (version,)):
            return
        self.ward.want(version or GOOD)
        machine.wait_for(
            lambda: version_of(self.ward.memory.current()) == (version or GOOD) and not self.ward.fault(),
            f"{MEMORY} {version or GOOD}", BEGUN_S, lambda: f"{self.ward.fault()}\n{self.ward.node.logs(40)}", 0.03,
        )  # fmt: skip


def version_of(release: str) -> str:
    """'' for no release."""
    return release.rpartition("-")[0]


def unfetch(line: Store, version: str) -> None:
    """Remove the release of this version, '' for all of them, so that it is fetched anew."""
    if not line.layout.releases.exists():
        return
    lock = line.lock()
    lock.acquire(BEGUN_S)
    with lock:
        if line.previous() != line.current() and version in ("", version_of(line.previous())):
            line.layout.previous.unlink(missing_ok=True)
        for release in line.names():
            if version in ("", version_of(release)):
                line.remove_release(release)
