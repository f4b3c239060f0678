"""The trial of a system that came up: by the same rules as that of any other release (core/trial.py)."""

from __future__ import annotations

from instar.core.errors import InstarError, ServerRefused, ServerUnreachable
from instar.core.journal import Progress, Reason
from instar.core.lease import Lease
from instar.core.light import asdict
from instar.core.trial import Confirm, Facts, Health, Revert, judge, read_health
from instar.engine.target import Failed, Notes
from instar.host.sockets import ask
from instar.targets.kit import Kit

ROLE = "os"
LOOK_S = 0.25
ASK_S, VERDICT_S = 1.0, 1.0


def health(kit: Kit) -> dict[str, object]:
    """The agent's, before the machine goes down; what it would say if it is silent."""
    try:
        said = read_health(ask(kit.layout.socket("agent"), {"do": "health"}, ASK_S))
    except InstarError:
        return {"connected": False, "modules": {}}
    return {"connected": said.connected, "modules": said.modules}


class SlotTrial:
    """The slot that is on trial runs, and this looks at it to the end of its lease."""

    def __init__(self, kit: Kit, progress: Progress, notes: Notes) -> None:
        self._kit, self._begin = kit, progress.begin
        self._before = read_health(progress.data.get("before", {}))
        self._lease = self._of_this_boot(Lease(**progress.data["lease"]), notes)
        self._pid, self._since = 0, kit.clock.boottime()

    def _of_this_boot(self, lease: Lease, notes: Notes) -> Lease:
        """The way down and up again does not count."""
        clock = self._kit.clock
        if lease.boot_id == clock.boot_id():
            return lease
        lease = Lease(lease.lease_s, lease.cap_s, clock.boot_id(), clock.boottime())
        notes.note({"lease": asdict(lease)})
        return lease

    def watch(self) -> None:
        """Returns when the system is to be confirmed. Raises Failed."""
        hold_s = self._kit.settings.trial.hold_s
        while True:
            match judge(self._facts(), self._begin.digest, self._before, hold_s, self._lease):
                case Confirm():
                    return
                case Revert(reason, blame):
                    raise Failed(reason, blame)
                case _:
                    self._kit.sleep(LOOK_S)

    def _facts(self) -> Facts:
        clock, digest = self._kit.clock, self._begin.digest
        spent = self._lease.spent(clock.boot_id(), clock.boottime())
        word, why = self._verdict()
        try:
            said = ask(self._kit.layout.socket("agent"), {"do": "health"}, ASK_S)
        except InstarError:
            self._pid = 0
            return Facts(spent, False, "", 0.0, Health(), word, why)
        pid = said.get("pid", 0)
        if type(pid) is not int:
            self._pid = 0
            return Facts(spent, False, "", 0.0, Health(), word, why, silence=f"it says pid {pid!r:.20}")
        if pid != self._pid:
            self._pid, self._since = pid, clock.boottime()
        # Whose root is mounted was looked at before: the agent of this system answers for it.
        return Facts(spent, True, digest, clock.boottime() - self._since, read_health(said), word, why)

    def _verdict(self) -> tuple[str, Reason]:
        try:
            said = self._kit.server.verdict(ROLE, "trial", self._begin.tx, self._begin.digest, VERDICT_S)
        except (ServerUnreachable, ServerRefused) as error:
            return "unreachable", Reason(error.code, error.text)
        return said.verdict, said.reason
