"""The node's two lines as the core replaces them: ordinary targets, whose archive is here already."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from instar.core.errors import TrustError
from instar.core.journal import Progress, Reason
from instar.core.releases import Release
from instar.engine.target import Failed, Notes, Outcome
from instar.host import trials
from instar.host.disks import check_flags, check_space
from instar.host.files import make_folder
from instar.targets.agent_release import AgentRelease
from instar.targets.kit import Kit
from instar.targets.line import UNPACKED_TIMES, LineTarget
from instar.targets.probe import Probe
from instar.targets.release import ReleaseTarget
from instar.targets.unpack import hash_file
from instar.targets.updater_release import UpdaterRelease

ARCHIVE = "archive"  # in a transaction's staging folder (targets/line.py)


def place(archive: Path, kit: Kit, tx: str) -> None:
    """Put `archive` where the transaction `tx` stages. To be called before it begins: from its first record
    on, any updater can go on with it. By a second name, for the other line takes the same archive."""
    staging = kit.layout.staging / tx
    make_folder(staging, 0o700, kit.disk)
    check_space(staging, archive.stat().st_size * UNPACKED_TIMES)
    try:
        os.link(archive, staging / ARCHIVE)
    except OSError:  # a file system without links
        shutil.copyfile(archive, staging / ARCHIVE)
    kit.disk.sync_folder(staging)


def adopt(target: LineTarget, progress: Progress) -> Outcome:
    """The stage step with an archive that is here: taken only if it is what is signed.

    Raises TrustError `altered-blob` when it is not.
    """
    begin, kit = progress.begin, target.kit
    make_folder(target.line.layout.releases, 0o755, kit.disk)
    check_flags(target.line.layout.releases)
    signed = kit.server.trusted_target(begin.target)
    target.check_promise(progress, signed)
    found = Outcome({"archive": {"length": signed.length, "sha256": signed.sha256}})
    if target.line.is_valid(begin.release.name):
        return found
    size, sha256 = hash_file(kit.layout.staging / begin.tx / ARCHIVE)
    if (size, sha256) != (signed.length, signed.sha256):
        text = f"the fetched bytes are not the signed ones: SHA-256 {sha256}, not {signed.sha256}"
        raise TrustError("altered-blob", text)
    return found


class RescuedAgent(AgentRelease):
    """The agent's line."""

    def stage(self, progress: Progress, notes: Notes) -> Outcome:
        return adopt(self, progress)

    def bring_back(self, release: str) -> None:
        """Where nothing sound is left to go back to, whoever plays the role goes on: it may be the beacon."""
        if self.line.is_valid(release):
            super().bring_back(release)

    def watch(self, progress: Progress, notes: Notes) -> Outcome:
        if not self.line.is_valid(progress.begin.release.name):
            raise Failed(Reason("release-damaged", "its files are not what was signed"), blame=False)
        return super().watch(progress, notes)


class RescuedUpdater(UpdaterRelease):
    """Activating ends with a HandOver, as ever: the new updater goes on by the journal."""

    def stage(self, progress: Progress, notes: Notes) -> Outcome:
        return adopt(self, progress)

    def bring_back(self, release: str) -> None:
        """Its role is the core's, which gives it back at its own end."""

    def probe_restored(self, release: Release) -> Probe:
        probe = Probe(release, self.kit.settings.probe)
        probe.silent("a recovery core has the updater's role", self.kit.clock.boottime())
        return probe

    def watch(self, progress: Progress, notes: Notes) -> Outcome:
        """Only for what another left open: the updater on trial was ended, so nobody can judge it. If its
        trial was passed already, that stands."""
        trial = trials.read(self.line)
        if trial is not None and trial.tx == progress.begin.tx and trial.confirmed:
            return Outcome()
        raise Failed(Reason("superseded", "a recovery core took the updater's role"), blame=False)


def target_of(line: str, kit: Kit) -> ReleaseTarget:
    return RescuedAgent(kit) if line == "agent" else RescuedUpdater(kit)
