"""One line of releases on the disk. The disk is the truth: nothing is remembered here.

    <line>/
      releases/1.1.0-0123456789ab/
        instar.pyz  manifest.json  valid      `valid` holds the manifest's SHA-256; written last
      current  -> releases/1.1.0-0123456789ab
      previous -> releases/1.0.0-ba9876543210
      trial.json                              while `current` is on trial, or was put back by a guard
      lock                                    held by whoever moves `current` or ends a trial

A release is complete in itself and never written after it is valid.
Standard library only: the launcher reads releases through this.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from instar.core.errors import MachineError, ReleaseError
from instar.core.releases import is_release_name, version_key, version_of
from instar.host.files import DISK, Disk, point_link, remove, remove_tree, write_atomic
from instar.host.layout import LineLayout
from instar.host.locks import RoleLock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PROGRAM = "instar.pyz"
MANIFEST = "manifest.json"
VALID = "valid"
BLOCK = 1 << 18  # bytes that are read at once


class Line:
    """Reads and moves one line. Every method is idempotent unless it says otherwise."""

    def __init__(self, layout: LineLayout, disk: Disk = DISK) -> None:
        self.layout = layout
        self.disk = disk

    # --- what is there

    def folder(self, release: str) -> Path:
        return self.layout.releases / release

    def program(self, release: str) -> Path:
        return self.folder(release) / PROGRAM

    def current(self) -> str:
        """The name of the release that `current` points to; '' when it points to none."""
        return _named_by(self.layout.current)

    def previous(self) -> str:
        return _named_by(self.layout.previous)

    def names(self) -> list[str]:
        """All release folders, valid or not, lowest version first."""
        try:
            names = [n for n in os.listdir(self.layout.releases) if is_release_name(n)]
        except FileNotFoundError:
            return []
        return sorted(names, key=lambda n: (version_key(version_of(n)), n))

    def check(self, release: str) -> None:
        """Compare every file of a release with its manifest. Raises ReleaseError `release-damaged`."""
        folder = self.folder(release)
        try:
            marker = (folder / VALID).read_text().strip()
            manifest = (folder / MANIFEST).read_bytes()
            if hashlib.sha256(manifest).hexdigest() != marker:
                raise ReleaseError("release-damaged", f"cannot use {release}: its manifest was altered")
            for entry in json.loads(manifest)["files"]:
                _check_file(release, folder / entry["path"], entry)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ReleaseError("release-damaged", f"cannot use {release}: {error}") from None

    def is_valid(self, release: str) -> bool:
        if not is_release_name(release):
            return False
        try:
            self.check(release)
        except ReleaseError:
            return False
        return True

    # --- moving it

    def lock(self) -> RoleLock:
        """A lock to hold while `current` moves or a trial ends. The caller acquires it, with a bound."""
        return RoleLock(self.layout.lock)

    def mark_valid(self, release: str) -> None:
        """Write the marker that makes a release usable. The last write into its folder."""
        manifest = (self.folder(release) / MANIFEST).read_bytes()
        digest = hashlib.sha256(manifest).hexdigest()
        write_atomic(self.folder(release) / VALID, digest.encode(), 0o444, self.disk)

    def activate(self, release: str, fallback: str) -> None:
        """Point `current` to `release`, and `previous` to `fallback`. The target is checked right before."""
        self.check(release)
        if fallback and fallback != release and self.previous() != fallback:
            point_link(self.layout.previous, f"releases/{fallback}", self.disk)
        if self.current() != release:
            point_link(self.layout.current, f"releases/{release}", self.disk)

    def deactivate(self) -> None:
        """Let no release be current: the line's way out, for a thing that need not run at all."""
        remove(self.layout.current, self.disk)
        remove(self.layout.previous, self.disk)
        self.disk.sync_folder(self.layout.folder)  # also what a call that was killed has removed

    def remove_release(self, release: str) -> None:
        """Remove a release that nothing points to. Its marker goes first: half of it is never valid."""
        if release in (self.current(), self.previous()):
            raise MachineError("release-in-use", f"cannot remove {release}: a link points to it")
        folder = self.folder(release)
        if folder.exists():
            with contextlib.suppress(FileNotFoundError):
                remove(folder / VALID, self.disk)
            remove_tree(folder, self.disk)

    def collect(self, keep: Iterable[str]) -> list[str]:
        """Remove every release but current, previous and `keep`; says which. Unsure means keep."""
        current = self.current()
        if not current:
            return []
        kept = {current, self.previous(), *keep}
        gone = [name for name in self.names() if name not in kept]
        for name in gone:
            self.remove_release(name)
        return gone

    # --- the trial's record, shared with the launcher

    def trial(self) -> dict[str, Any] | None:
        """The trial's record; None without one, or with one that cannot be read (it is set aside)."""
        try:
            record = json.loads(self.layout.trial.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or record.get("v") != 1:
            self.set_trial_aside()
            return None
        return record

    def set_trial_aside(self) -> None:
        """A record that nobody can read must not stop a node: there is no trial, `current` stays."""
        with contextlib.suppress(OSError):
            os.replace(self.layout.trial, self.layout.trial.with_suffix(".unreadable"))

    def write_trial(self, record: dict[str, Any]) -> None:
        write_atomic(self.layout.trial, json.dumps({"v": 1, **record}).encode(), 0o600, self.disk)

    def end_trial(self) -> None:
        remove(self.layout.trial, self.disk)


def _named_by(link: Path) -> str:
    try:
        target = os.readlink(link)
    except OSError:
        return ""
    folder, _, name = target.rpartition("/")
    return name if folder == "releases" and is_release_name(name) else ""


def _check_file(release: str, path: Path, entry: dict[str, Any]) -> None:
    digest = hashlib.sha256()
    block = memoryview(bytearray(BLOCK))  # not mapped: a bad spot on the disk must be an error, not a signal
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with open(fd, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    if digest.hexdigest() != entry["sha256"]:
        text = (
            f"cannot use {release}: {path.name}: expected SHA-256 {entry['sha256']}, got {digest.hexdigest()}"
        )
        raise ReleaseError("release-damaged", text)
