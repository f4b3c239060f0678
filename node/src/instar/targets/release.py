"""A release of the node program, as a thing that can be replaced: what both of its lines have in common.

The launcher counts the starts of a release on trial by the trial's record.
"""

from __future__ import annotations

from instar.core.errors import ServerUnreachable
from instar.core.journal import Progress, Reason
from instar.engine.target import Failed, Notes, NotNow, Outcome
from instar.host import processes
from instar.host.children import run_program
from instar.host.line import Line
from instar.host.points import reach
from instar.targets.contents import NODE
from instar.targets.kit import Kit
from instar.targets.line import LineTarget

VERDICT_WAIT_S = 5.0


class ReleaseTarget(LineTarget):
    """One line's releases. Subclasses say how the role's process is watched and replaced."""

    def __init__(self, kit: Kit, role: str) -> None:
        super().__init__(kit, role, Line(kit.layout.line(role), kit.disk), NODE)

    def rehearse(self, progress: Progress, notes: Notes) -> Outcome:
        begin = progress.begin
        if begin.cause == "rollback":
            return Outcome()  # it ran here before, and the way back must not need the server
        within_s = self.kit.settings.rehearsal.within_s
        arguments = [self.role, "--rehearse", "--state", str(self.kit.layout.state), "--tx", begin.tx]
        reach("rehearse:run")
        ended = run_program(
            self.line.program(begin.release.name), [*arguments, "--within", f"{within_s:g}"], within_s
        )
        wait_s = VERDICT_WAIT_S if ended.status == 0 else 0.0  # after a failure nothing more is to come
        verdict = self.kit.server.verdict(self.role, "rehearsal", begin.tx, begin.digest, wait_s)
        if verdict.verdict == "fail":
            raise Failed(verdict.reason)
        if ended.status != 0:
            if verdict.verdict == "wait" and ended.status == ServerUnreachable.exit_status:
                raise NotNow(Reason("server-unreachable", ended.describe("the rehearsal")))
            raise Failed(Reason("rehearsal-failed", ended.describe("the rehearsal")))
        if verdict.verdict != "pass":
            raise Failed(
                Reason("no-verdict", "the rehearsal ended well, but the server did not confirm its job")
            )
        return Outcome({"rehearsed_s": round(ended.seconds, 3)})

    def bring_up(self, release: str) -> None:
        """See that the role's process runs `release`, or is being started to."""
        process = processes.recorded(self.kit.layout.process(self.role))
        fits = process is not None and process.release == release
        if process is not None and fits and processes.alive(process, self.kit.clock.boot_id()):
            return
        self.kit.services.restart(self.role)
