"""The TUF repository in a folder, as nodes see it.

    <folder>/
      metadata/  1.root.json … N.targets.json N.snapshot.json timestamp.json
      targets/   node/<sha256>.instar-1.1.0.tar.gz        a second name of the blob
      blobs/     <sha256>                                  uploaded, whether signed for or not

The order of every change: names of blobs, N.targets, N.snapshot, and last, by one rename,
timestamp.json. A kill at any point leaves what was served before, and a file that nothing points
to, which the next publish overwrites. `metadata('timestamp.json')` hands out a new timestamp
only when it is durable: no power cut takes a node's view back. Time is an argument (`now`).

All calls block on the disk and may be made from several threads; one process at a time owns the
folder (`flock` on `lock`; the second gets MachineError `repository-in-use`).
"""

from __future__ import annotations

import json
import os
import re
import threading
from datetime import UTC, datetime
from pathlib import Path

from tuf.api.metadata import Metadata, Root, Targets

from instar.core.errors import InputError, TrustError
from instar.trust.embedded import EmbeddedConfig, format_comment
from instar.trust.program import join_program, split_program
from instar_server.trust import rules
from instar_server.trust.blobs import Blobs
from instar_server.trust.files import DISK, Disk, make_folder, write_atomic
from instar_server.trust.loading import bytes_of, hold, load_roots, load_served
from instar_server.trust.online import OnlineRoles, Signed, verifies_under
from instar_server.trust.records import (
    Lifetimes,
    OnlineSigners,
    Published,
    RoleStatus,
    Served,
    TargetRecord,
)

METADATA_NAME = re.compile(r"timestamp\.json|[1-9][0-9]{0,9}\.(root|targets|snapshot)\.json")
LIFETIMES = Lifetimes()


def utc_now() -> datetime:
    return datetime.now(UTC)


class Repository:
    """See the module's docstring. Make one by `create` or `open`."""

    def __init__(self, folder: Path, online: OnlineSigners, lifetimes: Lifetimes, disk: Disk) -> None:
        self.folder = folder
        self.blobs = Blobs(folder, disk)
        self._online = OnlineRoles(online, lifetimes)
        self._disk = disk
        self._lock = threading.RLock()
        self._held = hold(folder)
        self._root: Metadata[Root]
        self._targets: Metadata[Targets] | None = None
        self._signed: Signed | None = None  # for these targets

    # ---- making and opening

    @classmethod
    def create(
        cls,
        folder: Path,
        root: bytes,
        online: OnlineSigners,
        now: datetime,
        lifetimes: Lifetimes = LIFETIMES,
        disk: Disk = DISK,
    ) -> Repository:
        """Make a repository whose first root is `root` (any version, signed by its own threshold).

        It serves no timestamp until the first `publish_targets`. Creating again with the same root
        is no error (InputError `repository-exists` with another one).
        """
        first = rules.check_root(root, None, now)
        for name in ("metadata", "targets", "blobs"):
            make_folder(folder / name, disk)
        path = folder / "metadata" / f"{first.signed.version}.root.json"
        roots = sorted((folder / "metadata").glob("*.root.json"))
        if roots and not (path.is_file() and path.read_bytes() == root):
            raise InputError("repository-exists", f"cannot create {folder}: it holds another root already")
        write_atomic(path, root, disk=disk)
        return cls.open(folder, online, now, lifetimes, disk)

    @classmethod
    def open(
        cls,
        folder: Path,
        online: OnlineSigners,
        now: datetime,
        lifetimes: Lifetimes = LIFETIMES,
        disk: Disk = DISK,
    ) -> Repository:
        """Open what `create` made; finishes a key change that was cut short, signs anew what is due.

        Raises InputError `no-repository`, TrustError when what lies there does not verify.
        """
        if not (folder / "metadata").is_dir():
            raise InputError("no-repository", f"cannot open {folder}: no metadata folder in it")
        repository = cls(folder, online, lifetimes, disk)
        try:
            repository._load()
            repository.refresh(now)
        except BaseException:
            repository.close()
            raise
        return repository

    def close(self) -> None:
        """Give the folder free. The object is of no use afterwards."""
        os.close(self._held)

    # ---- what nodes read

    def metadata(self, name: str) -> bytes | None:
        """The bytes of `timestamp.json` or `<version>.<role>.json`; None for any other name or absent."""
        if not METADATA_NAME.fullmatch(name):
            return None
        if name == "timestamp.json":
            signed = self._signed
            return signed.timestamp_bytes if signed else None
        try:
            return (self.folder / "metadata" / name).read_bytes()
        except FileNotFoundError:
            return None

    def target_file(self, url_path: str) -> Path | None:
        """The file behind `<dir>/<sha256>.<file>` (without `targets/`); None when absent or unsafe."""
        return self.blobs.served(url_path)

    def targets(self) -> list[TargetRecord]:
        """All targets that are signed for now, by path."""
        current = self._targets
        if current is None:
            return []
        return [
            TargetRecord(path, target.length, target.hashes["sha256"], dict(target.custom or {}))
            for path, target in sorted(current.signed.targets.items())
        ]

    def served(self) -> Served:
        """All that a node needs to trust a target, of one moment."""
        with self._lock:
            if self._targets is None or self._signed is None:
                return Served([], [])
            folder = self.folder / "metadata"
            roots = sorted(folder.glob("[0-9]*.root.json"), key=lambda path: int(path.name.split(".")[0]))
            files = [(path.name, path.read_bytes()) for path in roots]
            files.append(("timestamp.json", self._signed.timestamp_bytes))
            snapshot, targets = self._signed.snapshot.signed.version, self._targets.signed.version
            files.append((f"{snapshot}.snapshot.json", self._signed.snapshot_bytes))
            files.append((f"{targets}.targets.json", bytes_of(folder / f"{targets}.targets.json")))
            return Served(files, self.targets())

    def status(self, now: datetime) -> list[RoleStatus]:
        """Version and expiry of every role that is served."""
        root = self._root.signed
        rows = []
        online = (self._signed.snapshot, self._signed.timestamp) if self._signed else ()
        for metadata in (self._root, self._targets, *online):
            if metadata is not None:
                signed = metadata.signed
                role = root.roles[signed.type]
                rows.append(
                    RoleStatus(
                        signed.type,
                        signed.version,
                        int(signed.expires.timestamp()),
                        signed.is_expired(now),
                        role.threshold,
                        len(role.keyids),
                    )
                )
        return rows

    def versions(self) -> Published:
        """What is served now, without a look at the disk; 0 for what is not there yet."""
        targets, signed = self._targets, self._signed
        return Published(
            self._root.signed.version,
            targets.signed.version if targets else 0,
            signed.snapshot.signed.version if signed else 0,
            signed.timestamp.signed.version if signed else 0,
        )

    def root(self) -> bytes:
        """The current root metadata."""
        return bytes_of(self.folder / "metadata" / f"{self._root.signed.version}.root.json")

    # ---- publishing

    def publish_targets(self, data: bytes, now: datetime) -> Published:
        """Serve the signed targets metadata `data` and sign a snapshot and a timestamp for it.

        Publishing the very bytes that are served is no error and changes nothing (a caller may retry).
        Raises TrustError (`wrong-threshold`, `bad-signature`, `expired`), InputError (`bad-metadata`,
        `old-targets`, `missing-blob`, `blob-mismatch`, …). Nothing is served on an error.
        """
        with self._lock:
            if self._targets is not None and data == self._read(self._targets):
                return self.versions()
            current = self._targets.signed if self._targets else None
            metadata = rules.check_targets(data, self._root.signed, current, now)
            self.blobs.serve(metadata.signed)
            self._write(f"{metadata.signed.version}.targets.json", data)
            self._sign_online(metadata, data, now)
            return self.versions()

    def publish_root(self, data: bytes, now: datetime, online: OnlineSigners | None = None) -> Published:
        """Serve the next root. `online` are the signers from now on, when it changes the online keys.

        With other online keys, snapshot and timestamp are first signed by the old and the new ones, so that
        a node on either root can follow. Raises as `publish_targets`, and TrustError
        `targets-not-under-root` when the new root would not accept the targets that are served.
        """
        with self._lock:
            if data == self.metadata(f"{self._root.signed.version}.root.json"):
                return self.versions()
            metadata = rules.check_root(data, self._root.signed, now)
            joined = self._online.joined_by(online)
            joined.check(metadata.signed)
            self._check_targets_under(metadata.signed)
            self._online = joined
            if self._targets and self._signed and not verifies_under(metadata.signed, self._signed):
                self._sign_online(self._targets, self._read(self._targets), now, metadata.signed)
            self._write(f"{metadata.signed.version}.root.json", data)
            self._root = metadata
            return self.versions()

    def refresh(self, now: datetime) -> bool:
        """Sign snapshot and timestamp anew when less than half of their life is left. True when it did."""
        with self._lock:
            if self._targets is None or not self._online.due(self._signed, self._root.signed, now):
                return False
            self._sign_online(self._targets, self._read(self._targets), now)
            return True

    # ---- the program that a server hands out

    def sign_config(self, data: bytes) -> bytes:
        """The ed25519 signature (64 bytes) of a key of the timestamp role of the current root over `data`."""
        return self._online.sign_config(self._root.signed, data)

    def embed(self, program: bytes, *, server: str, ca: str, token: str, group: str) -> bytes:
        """`program` with this operator's configuration in its zip comment, instead of any that it had."""
        config = EmbeddedConfig(1, server, ca, json.loads(self.root()), token, group)
        bare, _ = split_program(program)
        return join_program(bare, format_comment(config.encode(), self.sign_config))

    # ---- inside

    def _write(self, name: str, data: bytes) -> None:
        write_atomic(self.folder / "metadata" / name, data, disk=self._disk)

    def _read(self, targets: Metadata[Targets]) -> bytes:
        """The very bytes of the targets metadata that are served."""
        return (self.folder / "metadata" / f"{targets.signed.version}.targets.json").read_bytes()

    def _sign_online(
        self, targets: Metadata[Targets], data: bytes, now: datetime, next_root: Root | None = None
    ) -> None:
        """Sign a snapshot of `targets`, whose bytes are `data`, and a timestamp, and serve them.

        With `next_root` they are good under the current root and under that one.
        """
        roots = [self._root.signed, *([next_root] if next_root else [])]
        signed = self._online.sign(targets, data, self._signed, roots, now)
        self._write(f"{signed.snapshot.signed.version}.snapshot.json", signed.snapshot_bytes)
        self._write("timestamp.json", signed.timestamp_bytes)
        self._targets, self._signed = targets, signed

    def _check_targets_under(self, root: Root) -> None:
        if self._targets is None:
            return
        try:
            rules.check_signatures(self._targets, root, f"root version {root.version}")
        except TrustError as error:
            raise TrustError(
                "targets-not-under-root",
                f"cannot publish root version {root.version}: {error.text}. "
                "Publish targets signed by the old and the new keys first",
            ) from error

    def _load(self) -> None:
        """Read and verify what is served."""
        self._root = load_roots(self.folder / "metadata")
        self._online.check(self._root.signed)
        found = load_served(self.folder / "metadata", self._root.signed)
        if found is not None:
            self._targets, self._signed = found
