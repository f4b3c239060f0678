"""A release of the node program, as a thing that can be replaced: what both of its lines have in common.

The launcher counts the starts of a release on trial by the trial's record.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instar.core.errors import InstarError, ServerUnreachable
from instar.core.journal import Progress, Reason
from instar.core.releases import Release
from instar.core.transaction import Step
from instar.engine.target import Failed, Notes, NotNow, Outcome
from instar.host import captured, processes, trials
from instar.host.children import run_program
from instar.host.line import Line
from instar.host.points import reach
from instar.targets.contents import NODE
from instar.targets.kit import Kit
from instar.targets.line import LineTarget
from instar.targets.probe import Both, Probe, told

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

    def unpack(self, archive: Path, release: Release) -> None:
        """While a damaged release is put there anew, the launcher must not look at half of it."""
        if self.line.current() != release.name:
            super().unpack(archive, release)
            return
        with self._locked():
            super().unpack(archive, release)

    def marks(self) -> dict[str, object]:
        kit = self.kit
        return {"log": captured.mark(kit.layout, self.role, kit.services.name, kit.clock)}

    def revert(self, progress: Progress, notes: Notes) -> Outcome:
        """As ever; and once a switch was begun, both releases are probed, for whoever asks why."""
        if not progress.intended(Step.ACTIVATE):
            return super().revert(progress, notes)
        why = progress.reason.text if progress.reason else ""
        candidate = (progress.data.get("probes") or {}).get("candidate")
        if candidate is None:  # the launcher or a guard ended its trial, or the server did
            candidate = told(progress.begin.release.name, False, 0, why, self.output(progress))
            notes.note({"probes": {"candidate": candidate}})
        since = captured.mark(self.kit.layout, self.role, self.kit.services.name, self.kit.clock)
        super().revert(progress, notes)
        both = Both(candidate, self._restored(since))
        reason = Reason(progress.reason.code, f"{why}; {both.in_short()}") if progress.reason else None
        return Outcome({"probes": {"candidate": both.candidate, "restored": both.restored}}, reason)

    def _restored(self, since: dict[str, Any]) -> dict[str, Any]:
        name = self.line.current()
        try:
            probe = self.probe_restored(self.release_of(name))
        except InstarError as error:
            return told(name, False, 0, error.text)
        return probe.told(self._output(since))

    def probe_restored(self, release: Release) -> Probe:
        """Ask the process that plays the role now whether it is `release`."""
        raise NotImplementedError

    def output(self, progress: Progress) -> str:
        """What the role has said since right before the switch; '' for nothing."""
        since = progress.data.get("log")
        return self._output(since if isinstance(since, dict) else {})

    def _output(self, since: dict[str, Any]) -> str:
        return captured.tail(self.kit.layout, self.role, self.kit.services.name, since)

    def unstarted(self, release: str) -> bool:
        """Whether its trial has begun and nobody was started for it: what may run of it runs from before,
        as when a damaged release is put there anew."""
        trial = trials.read(self.line)
        return trial is not None and trial.open and trial.release == release and trial.attempts == 0

    def bring_up(self, release: str) -> None:
        """See that the role's process runs `release`, or is being started to."""
        process = processes.recorded(self.kit.layout.process(self.role))
        fits = process is not None and process.release == release and not self.unstarted(release)
        if process is not None and fits and processes.alive(process, self.kit.clock.boot_id()):
            return
        self.kit.services.restart(self.role)
