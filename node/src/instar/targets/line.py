"""A line of releases as a thing that can be replaced: what the node's program and modules have in common.

Staging, verifying and rehearsing leave everything that runs alone. Activating writes the trial's
record first, then moves `current`. Reverting is allowed from every state, and needs no help of the
release on trial. How a release is rehearsed, brought up and watched is for the subclasses.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from instar.core import quarantine
from instar.core.errors import InputError, InstarError, MachineError, TrustError
from instar.core.held import Hold
from instar.core.journal import Begin, Progress, Reason
from instar.core.recovery import Observation
from instar.core.releases import Release, version_of
from instar.core.transaction import DEADLINE_S, Step
from instar.core.trial import Lease, read_health
from instar.engine.fetch import Limits, fetch
from instar.engine.target import Failed, Notes, Outcome
from instar.host import trials
from instar.host.disks import check_flags, check_space
from instar.host.files import make_folder, remove_tree
from instar.host.line import MANIFEST, Line
from instar.host.locks import RoleLock
from instar.host.parcel import Parcel
from instar.host.points import reach
from instar.host.records import read_held, read_quarantine, write_held, write_quarantine
from instar.host.sockets import ask
from instar.targets import parcels
from instar.targets.contents import Contents
from instar.targets.kit import Kit, TrustedTarget
from instar.targets.unpack import hash_file, replace_files, unpack, unpack_into

LOCK_WAIT_S = 10.0
HEALTH_WAIT_S = 2.0
UNPACKED_TIMES = 4  # a release takes at most about this many times its archive, unpacked


class LineTarget:
    """`role` is the line's name in journals, wishes and verdicts. Holds only what can be found out again."""

    def __init__(self, kit: Kit, role: str, line: Line, contents: Contents) -> None:
        self.kit, self.role, self.line, self.contents = kit, role, line, contents

    # --- the steps that leave everything that runs alone

    def observe(self, progress: Progress) -> Observation:
        trial = trials.read(self.line)
        ours = trial is not None and trial.tx == progress.begin.tx
        undone = trial.undone if trial is not None and ours else None
        return Observation(self.line.current(), self.line.previous(), undone)

    def stage(self, progress: Progress, notes: Notes) -> Outcome:
        begin = progress.begin
        if begin.cause == "rollback":
            return Outcome()
        staging = self._staging(progress)
        make_folder(staging, 0o700, self.kit.disk)
        make_folder(self.line.layout.releases, 0o755, self.kit.disk)
        check_flags(self.line.layout.releases)
        archive = staging / "archive"
        needed = begin.forced or not self.line.is_valid(begin.release.name)
        parcel, target = self._trusted(progress, archive if needed else None)
        if needed:
            self._bring(parcel, target, archive)
        return Outcome({"archive": {"length": target.length, "sha256": target.sha256}})

    def _trusted(self, progress: Progress, archive: Path | None) -> tuple[Parcel | None, TrustedTarget]:
        """What is signed, and the parcel that says so, if there is one; `archive` is None where its bytes are not
        needed: its metadata are, on a node that cannot reach the server's.

        A parcel whose metadata are of no use (expired, say) is removed: it would block its release for as long
        as it lies there. Then the server is asked; where it must come as a parcel, another one is waited for.
        A push ends: nobody sends it again.
        """
        begin = progress.begin
        while True:
            parcel = parcels.found(self.kit, begin, archive)
            try:
                target = self.kit.server.trusted_target(begin.target, parcel.metadata if parcel else None)
                self.check_promise(progress, target)
                return parcel, target
            except MachineError:
                raise
            except InstarError as error:
                if parcel is None:
                    raise
                parcels.drop(self.kit, parcel, error)
                if begin.via == "push":
                    raise TrustError(error.code, error.text) from error

    def _bring(self, parcel: Parcel | None, target: TrustedTarget, archive: Path) -> None:
        kit = self.kit
        if parcel is not None:
            check_space(archive.parent, target.length * UNPACKED_TIMES)
            reach("stage:parcel")
            parcels.take(kit, parcel, target, archive)
        else:
            check_space(archive.parent, target.length * (1 + UNPACKED_TIMES))
            limits = Limits(kit.settings.network.rate_bytes_s, deadline_s=DEADLINE_S[Step.STAGE])
            reach("stage:fetch")
            length = target.length

            def progress(done: int) -> None:
                kit.brought(done, length)

            fetch(kit.server.source(), target.path, archive, length, limits, progress, kit.sleep)
        kit.disk.sync_folder(archive.parent)

    def verify(self, progress: Progress, notes: Notes) -> Outcome:
        release = progress.begin.release
        if progress.begin.cause == "rollback":
            self.line.check(release.name)
            return Outcome()
        archive, signed = self._staging(progress) / "archive", progress.data["archive"]
        valid = self.line.is_valid(release.name)
        # Of a forced one this step has removed the archive: once it is gone, the files are in place.
        if not valid or (progress.begin.forced and archive.exists()):
            size, sha256 = hash_file(archive)
            if (size, sha256) != (signed["length"], signed["sha256"]):
                text = f"the fetched bytes are not the signed ones: SHA-256 {sha256}, not {signed['sha256']}"
                raise TrustError("altered-blob", text)
            if valid:
                self._replace(archive, release)
            else:
                self.unpack(archive, release)
        remove_tree(self._staging(progress), self.kit.disk)
        return Outcome()

    def _replace(self, archive: Path, release: Release) -> None:
        """The files of a sound release by those of the archive, which are the same: each by a rename, so that it is
        whole at any moment, for the launcher and after a power cut."""
        beside = archive.with_name("files")
        unpack_into(beside, archive, release, self.kit.disk, self.contents)
        with self._locked():
            replace_files(beside, self.line, release.name, self.kit.disk, self.contents)

    def rehearse(self, progress: Progress, notes: Notes) -> Outcome:
        raise NotImplementedError

    # --- the switch

    def activate(self, progress: Progress, notes: Notes) -> Outcome:
        begin = progress.begin
        if "before" not in progress.data:
            notes.note({"before": self.health_before(), **self.marks()})
        with self._locked():
            trial = trials.read(self.line)
            if trial is None or trial.tx != begin.tx:  # one left by a journal that was lost is nobody's
                trials.write(self.line, self._new_trial(progress))
            reach("activate:trial")
            self.line.activate(begin.release.name, fallback=begin.origin)
            reach("activate:flipped")
        self.bring_up(begin.release.name)
        return Outcome()

    def watch(self, progress: Progress, notes: Notes) -> Outcome:
        raise NotImplementedError

    def confirm(self, progress: Progress, notes: Notes) -> Outcome:
        self._end_trial(progress)
        reach("confirm:ended")
        if progress.begin.cause == "rollback":
            reason = Reason("rolled-back", f"an operator went back to {progress.begin.version}")
            self._quarantine(progress, progress.begin.origin, reason)
        self._hold(progress.begin)
        self.collect()
        remove_tree(self._staging(progress), self.kit.disk)
        return Outcome()

    def revert(self, progress: Progress, notes: Notes) -> Outcome:
        begin = progress.begin
        candidate = begin.release.name
        touched = not begin.anew or progress.intended(Step.ACTIVATE)
        with self._locked():
            if touched and self.line.current() in (candidate, begin.origin):
                self.put_back(begin.way_back, "" if begin.anew else begin.fallback)
        reach("revert:flipped")
        self.bring_back(self.line.current())
        if progress.data.get("blame", True) and begin.cause != "rollback" and progress.reason is not None:
            self._quarantine(progress, candidate, progress.reason)
        reach("revert:quarantined")
        self._end_trial(progress)
        remove_tree(self._staging(progress), self.kit.disk)
        if candidate not in (self.line.current(), self.line.previous()) and begin.cause != "rollback":
            self.line.remove_release(candidate)
        return Outcome()

    def release_of(self, name: str) -> Release:
        """The release in a folder of this line. Raises MachineError `release-damaged`."""
        try:
            return self.contents.release((self.line.folder(name) / MANIFEST).read_bytes())
        except (OSError, InputError) as error:
            raise MachineError("release-damaged", f"cannot read the manifest of {name}: {error!r}") from None

    # --- for subclasses

    def unpack(self, archive: Path, release: Release) -> None:
        unpack(archive, self.line, release, self.kit.disk, self.contents)

    def put_back(self, origin: str, fallback: str) -> None:
        """Point `current` to what it named before. Whoever calls holds the line's lock."""
        if self.line.is_valid(origin):
            self.line.activate(origin, fallback)

    def bring_up(self, release: str) -> None:
        """See that what the line is for runs `release`, or is being started to. Idempotent."""
        raise NotImplementedError

    def bring_back(self, release: str) -> None:
        """The same after a revert, when `release`, '' for none, is what `current` names."""
        self.bring_up(release)

    def collect(self) -> None:
        """Remove the releases that are no longer needed, once a trial was passed."""
        self.line.collect(keep=())

    def undo_orphan(self, trial: trials.Trial, reason: Reason) -> None:
        """End a trial that no journal speaks of: it was never confirmed. Whoever calls holds the lock."""
        trials.undo(self.line, trial, reason)

    def least_lease_s(self, progress: Progress) -> float:
        """Seconds that a trial of this release needs at the least."""
        return 0.0

    def health_before(self) -> dict[str, object]:
        """The agent's health before the switch, for the comparison; what it would say if it is silent."""
        try:
            answer = ask(self.kit.layout.socket("agent"), {"do": "health"}, HEALTH_WAIT_S)
        except InstarError:
            return {"connected": False, "modules": {}}
        health = read_health(answer)
        return {"connected": health.connected, "modules": health.modules}

    def marks(self) -> dict[str, object]:
        """What else is written down right before the switch."""
        return {}

    def commit(self, progress: Progress) -> None:
        """Decide for good that the trial is passed. The first of this and an undo wins (host/trials.py)."""
        with self._locked():
            trial = trials.read(self.line)
            if trial is None or trial.tx != progress.begin.tx:
                raise Failed(Reason("undone", "its trial was ended by somebody else"))
            if trial.undone is not None:
                raise Failed(trial.undone)
            if self.line.current() != progress.begin.release.name:
                raise Failed(Reason("undone", f"{self.line.current()} is active in its place"))
            trials.write(self.line, replace(trial, confirmed=True))
        reach("watch:committed")

    # --- small things

    def _staging(self, progress: Progress) -> Path:
        return self.kit.layout.staging / progress.begin.tx

    def _locked(self) -> RoleLock:
        lock = self.line.lock()
        lock.acquire(LOCK_WAIT_S)
        return lock

    def check_promise(self, progress: Progress, target: TrustedTarget) -> None:
        """Raise TrustError `wish-differs` unless what is signed is what the server wants."""
        begin = progress.begin
        for name, want in self.contents.promise(begin.release).items():
            signed = target.custom.get(name)
            if signed != want:
                text = f"{begin.target}: the server wants {name} {want}, the signed metadata says {signed}"
                raise TrustError("wish-differs", text)

    def _new_trial(self, progress: Progress) -> trials.Trial:
        begin, clock, wanted = progress.begin, self.kit.clock, self.kit.settings.trial
        lease_s = max(wanted.lease_s, self.least_lease_s(progress))
        lease = Lease(lease_s, max(wanted.cap_s, lease_s), clock.boot_id(), clock.boottime())
        return trials.Trial(begin.tx, begin.release.name, begin.way_back, wanted.attempts, lease)

    def _end_trial(self, progress: Progress) -> None:
        with self._locked():
            trial = trials.read(self.line)
            if trial is not None and trial.tx == progress.begin.tx:
                self.line.end_trial()

    def _hold(self, begin: Begin) -> None:
        """A confirmed push holds its line (core/held.py); whatever else was confirmed ends the hold."""
        path = self.kit.layout.held
        held = read_held(path)
        left = {line: hold for line, hold in held.items() if line != begin.line}
        if begin.cause == "push":
            since = self.kit.clock.wall()
            left[begin.line] = Hold(begin.version, begin.digest, begin.generation, since)
        if left != held:
            write_held(path, left, self.kit.disk)

    def _quarantine(self, progress: Progress, release: str, reason: Reason) -> None:
        path = self.kit.layout.quarantine
        same = release == progress.begin.release.name
        digest = progress.begin.digest if same else self.release_of(release).digest
        name, entries = quarantine.key(self.role, digest), read_quarantine(path)
        old = entries.get(name)
        if old is not None and old.since >= progress.began.wall:
            return  # this failure is counted already: a kill came before its outcome was written
        now = self.kit.clock.wall()
        entries = quarantine.add(entries, name, version_of(release), reason, now, progress.begin.generation)
        write_quarantine(path, entries, self.kit.disk)
