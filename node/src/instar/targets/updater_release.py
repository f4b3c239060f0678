"""The updater's own releases. The process that drives is the one that gets replaced.

So activating ends with a hand-over: this process becomes the launcher, which counts the start and
becomes the new updater, which finds the open transaction in the journal and goes on. If the new one
does not come up, the launcher puts the old one back; if it hangs, the agent's guard does; the old
one then finds out and finishes the revert.
"""

from __future__ import annotations

import os
from typing import Any

from instar.core.errors import InstarError
from instar.core.journal import Progress
from instar.core.releases import Release
from instar.engine.target import HandOver, Notes, Outcome
from instar.host.points import reach
from instar.targets.kit import Kit
from instar.targets.probe import Probe
from instar.targets.release import ReleaseTarget
from instar.targets.watching import Watch, ask_agent


class UpdaterRelease(ReleaseTarget):
    def __init__(self, kit: Kit) -> None:
        super().__init__(kit, "updater")

    def bring_up(self, release: str) -> None:
        """Hand over unless this very process is that release."""
        if self.kit.program.path.parent.name != release or self.unstarted(release):
            reach("updater:hand-over")
            raise HandOver(release)

    def bring_back(self, release: str) -> None:
        """Where nothing sound is left to go back to, this process stays: the launcher chose it for that."""
        if self.line.is_valid(release):
            super().bring_back(release)

    def watch(self, progress: Progress, notes: Notes) -> Outcome:
        self.bring_up(progress.begin.release.name)
        agent_was_heard = bool(progress.data.get("before", {}).get("connected"))
        Watch(self, progress, notes).run(lambda kit: self._answer(kit, agent_was_heard))
        return Outcome()

    def probe_restored(self, release: Release) -> Probe:
        """What was put back is this very process, or nobody can tell."""
        probe, program = Probe(release, self.kit.settings.probe), self.kit.program
        own = {"version": program.version, "digest": program.digest, "pid": os.getpid()}
        probe.heard(own, self.kit.clock.boottime())
        return probe

    def _answer(self, kit: Kit, agent_was_heard: bool) -> dict[str, Any]:
        """This process is the one on trial: what it says of itself, and of the agent that it must hear.

        An agent that was silent before may stay so: only what got worse counts.
        """
        try:
            health = ask_agent(kit)
        except InstarError:
            if agent_was_heard:
                raise
            health = {}
        return {**health, "pid": os.getpid(), "digest": kit.program.digest}
