"""The watch over a trial: gather what both sides say, judge it, and wait no longer than the lease.

Which process is asked, and what the server's verdict is about, is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from instar.core.errors import InstarError, ReleaseError, ServerRefused, ServerUnreachable
from instar.core.journal import Progress, Reason
from instar.core.trial import NO_REASON, Confirm, Facts, Health, Revert, Wait, judge, read_health
from instar.engine.target import Failed, Notes
from instar.host import trials
from instar.host.sockets import ask
from instar.targets.kit import Kit
from instar.targets.line import LOCK_WAIT_S, LineTarget
from instar.targets.probe import Probe

ASK_S = 1.0  # for one answer of the local API
VERDICT_S = 1.0  # how long one question for the verdict may be held open
QUICK_S, SLOW_S = 0.03, 0.25  # between two looks: quick at first, for a short trial
LEAST_S = 0.001  # what rounding leaves of the hold must not become a busy loop
QUICK_LOOKS = 100
MARK_S = 15.0  # how often the time that was used up goes to the disk, for the next boot


class Watch:
    """One trial being watched by one process. Holds only what can be found out again."""

    def __init__(
        self, target: LineTarget, progress: Progress, notes: Notes, probe: Probe | None = None
    ) -> None:
        """`probe`, where there is one, must have passed as well, and ends the trial early if it fails."""
        self.probe = probe
        self.target, self.kit, self.progress, self.notes = target, target.kit, progress, notes
        self.before = Health(**progress.data.get("before", {}))
        self._pid = 0
        self._pid_since = 0.0
        self._looks = 0
        self._stretched = False
        self._away_at = -math.inf  # when the server could last not be reached

    def run(self, answer: Callable[[Kit], dict[str, Any]]) -> None:
        """Watch until the release is to be confirmed. `answer` asks the one on trial; it raises InstarError
        while that is silent, a ReleaseError with what it lacks. Raises Failed when it is to be reverted."""
        next_mark = self.kit.clock.boottime() + MARK_S
        while True:
            trial = self._trial()
            if trial.confirmed:
                return
            facts = self._facts(trial, answer)
            hold_s = self.kit.settings.trial.hold_s
            match judge(facts, self.progress.begin.digest, self.before, hold_s, trial.lease):
                case Confirm() if self.probe is None or self.probe.passed:
                    self.target.commit(self.progress)
                    return
                case Confirm():
                    self._check_probe()
                    self._wait("it does not say that it is the wanted version", False, facts)
                case Revert(reason, blame):
                    raise Failed(reason, blame)
                case Wait(missing, stretched):
                    self._check_probe()
                    self._wait(missing, stretched, facts)
            if self.kit.clock.boottime() >= next_mark:
                self._mark()
                next_mark = self.kit.clock.boottime() + MARK_S

    def _check_probe(self) -> None:
        if self.probe is not None and self.probe.failed:
            raise Failed(Reason("probe-failed", self.probe.words()))

    def _trial(self) -> trials.Trial:
        trial = trials.read(self.target.line)
        if trial is None or trial.tx != self.progress.begin.tx:
            raise Failed(Reason("undone", "its trial was ended by somebody else"))
        if trial.undone is not None:
            raise Failed(trial.undone)
        return trial

    def _facts(self, trial: trials.Trial, answer: Callable[[Kit], dict[str, Any]]) -> Facts:
        """The server's word first, which may take a while, then the process's own: so the process that is
        believed has run until now, and did not end while the server thought."""
        clock = self.kit.clock
        spent = trial.lease.spent(clock.boot_id(), clock.boottime())
        verdict, reason = "wait", NO_REASON
        if self._pid or spent >= trial.lease.lease_s:
            verdict, reason = self._verdict()
        if verdict == "unreachable":
            self._away_at = clock.boottime()
        try:
            said = answer(self.kit)
            pid, health = int(said.get("pid", 0)), read_health(said)
        except (InstarError, TypeError, ValueError) as error:  # silent, or talking nonsense: the same
            self._pid = 0
            if self.probe is not None:
                why = error.text if isinstance(error, InstarError) else f"it talks nonsense: {error}"
                self.probe.silent(why, clock.boottime())
            facts = Facts(spent, False, "", 0.0, Health(), verdict, reason)
            return replace(facts, silence=error.text) if isinstance(error, ReleaseError) else facts
        if self.probe is not None:
            self.probe.heard(said, clock.boottime())
        if pid != self._pid:
            self._pid, self._pid_since = pid, clock.boottime()
        up_s = clock.boottime() - self._pid_since
        back_s = clock.boottime() - self._away_at
        return Facts(spent, True, str(said.get("digest")), up_s, health, verdict, reason, back_s)

    def _verdict(self) -> tuple[str, Reason]:
        begin = self.progress.begin
        if begin.cause == "rollback":
            return "pass", NO_REASON  # an operator's way back must not need the server
        try:
            verdict = self.kit.server.verdict(self.target.role, "trial", begin.tx, begin.digest, VERDICT_S)
        except (ServerUnreachable, ServerRefused) as error:
            return "unreachable", Reason(error.code, error.text)
        return verdict.verdict, verdict.reason

    def _wait(self, missing: str, stretched: bool, facts: Facts) -> None:
        if stretched and not self._stretched:
            self.notes.note({}, Reason("trial-stretched", missing))
            self._stretched = True
        self._looks += 1
        left_s = self.kit.settings.trial.hold_s - facts.up_s
        if facts.verdict == "pass" and left_s > 0:
            self.kit.sleep(min(max(left_s, LEAST_S), SLOW_S))  # only the hold is missing
        else:
            self.kit.sleep(QUICK_S if self._looks < QUICK_LOOKS else SLOW_S)

    def _mark(self) -> None:
        lock = self.target.line.lock()
        lock.acquire(LOCK_WAIT_S)
        with lock:
            trial = trials.read(self.target.line)
            if trial is not None and trial.open:
                clock = self.kit.clock
                lease = trial.lease.marked(clock.boot_id(), clock.boottime())
                trials.write(self.target.line, replace(trial, lease=lease))


def ask_agent(kit: Kit) -> dict[str, Any]:
    """The agent's own word on its health. Raises InstarError while it is silent."""
    return ask(kit.layout.socket("agent"), {"do": "health"}, ASK_S)
