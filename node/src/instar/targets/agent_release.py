"""The agent's releases. The updater, which runs older code, watches over the trial."""

from __future__ import annotations

from instar.core.journal import Progress
from instar.engine.target import Notes, Outcome
from instar.targets.kit import Kit
from instar.targets.release import ReleaseTarget
from instar.targets.watching import Watch, ask_agent


class AgentRelease(ReleaseTarget):
    def __init__(self, kit: Kit) -> None:
        super().__init__(kit, "agent")

    def watch(self, progress: Progress, notes: Notes) -> Outcome:
        Watch(self, progress, notes).run(ask_agent)
        return Outcome()
