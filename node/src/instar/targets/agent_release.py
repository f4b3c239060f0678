"""The agent's releases. The updater, which runs older code, watches over the trial."""

from __future__ import annotations

from instar.core.journal import Progress
from instar.core.releases import Release
from instar.engine.target import Failed, Notes, Outcome
from instar.targets.kit import Kit
from instar.targets.probe import Probe, probe_now
from instar.targets.release import ReleaseTarget
from instar.targets.watching import Watch, ask_agent


class AgentRelease(ReleaseTarget):
    def __init__(self, kit: Kit) -> None:
        super().__init__(kit, "agent")

    def watch(self, progress: Progress, notes: Notes) -> Outcome:
        probe = Probe(progress.begin.release, self.kit.settings.probe)
        try:
            Watch(self, progress, notes, probe).run(ask_agent)
        except Failed:
            notes.note({"probes": {"candidate": probe.told(self.output(progress))}})
            raise
        return Outcome({"probes": {"candidate": probe.told()}})

    def probe_restored(self, release: Release) -> Probe:
        return probe_now(self.kit, release, lambda: ask_agent(self.kit))
