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

from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from instar.core.errors import InputError, TrustError
from instar.trust.embedded import EmbeddedConfig, format_comment
from instar.trust.paths import check_path
from instar.trust.program import join_program, split_program
from instar_server.trust import rules
from instar_server.trust.files import DISK, Disk, failed, make_folder, write_atomic
from instar_server.trust.loading import (
    bytes_of,
    check_blob,
    digest_of,
    hold,
    load_one,
    load_roots,
    meta_file,
)
from instar_server.trust.online import check_online, merge, sign_under, verifies_under
from instar_server.trust.records import (
    Blob,
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
        self._online = online
        self._lifetimes = lifetimes
        self._disk = disk
        self._lock = threading.RLock()
        self._held = hold(folder)
        self._root: Metadata[Root]
        self._targets: Metadata[Targets] | None = None
        self._snapshot: Metadata[Snapshot] | None = None
        self._timestamp: Metadata[Timestamp] | None = None
        self._timestamp_bytes: bytes | None = None

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
            return self._timestamp_bytes
        try:
            return (self.folder / "metadata" / name).read_bytes()
        except FileNotFoundError:
            return None

    def target_file(self, url_path: str) -> Path | None:
        """The file behind `<dir>/<sha256>.<file>` (without `targets/`); None when absent or unsafe."""
        try:
            check_path(url_path, "target")
        except InputError:
            return None
        path = self.folder / "targets" / url_path
        return path if path.is_file() else None

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
            if self._targets is None or self._snapshot is None or self._timestamp_bytes is None:
                return Served([], [])
            folder = self.folder / "metadata"
            roots = sorted(folder.glob("[0-9]*.root.json"), key=lambda path: int(path.name.split(".")[0]))
            files = [(path.name, path.read_bytes()) for path in roots]
            files.append(("timestamp.json", self._timestamp_bytes))
            for metadata in (self._snapshot, self._targets):
                name = f"{metadata.signed.version}.{metadata.signed.type}.json"
                files.append((name, bytes_of(folder / name)))
            return Served(files, self.targets())

    def status(self, now: datetime) -> list[RoleStatus]:
        """Version and expiry of every role that is served."""
        root = self._root.signed
        rows = []
        for metadata in (self._root, self._targets, self._snapshot, self._timestamp):
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

    def root(self) -> bytes:
        """The current root metadata."""
        return bytes_of(self.folder / "metadata" / f"{self._root.signed.version}.root.json")

    # ---- blobs

    def add_blob(self, temporary: Path, expected_sha256: str | None = None) -> Blob:
        """Take over the uploaded file `temporary` (moved when on the same file system); idempotent.

        Raises InputError `blob-mismatch` when it is not what the uploader said; `temporary` then stays.
        """
        sha256, length = digest_of(temporary)
        if expected_sha256 is not None and expected_sha256 != sha256:
            raise InputError(
                "blob-mismatch", f"cannot store the blob: expected sha256 {expected_sha256}, got {sha256}"
            )
        final = self.folder / "blobs" / sha256
        try:
            self._disk.sync(temporary)
            self._disk.rename(temporary, final)
            self._disk.sync(final.parent)
        except OSError as error:
            raise failed("store", final, error) from error
        return Blob(sha256, length)

    def blob_staging(self) -> Path:
        """The folder in which to make the temporary file for `add_blob`, so that it can be renamed."""
        return self.folder / "blobs"

    # ---- publishing

    def publish_targets(self, data: bytes, now: datetime) -> Published:
        """Serve the signed targets metadata `data` and sign a snapshot and a timestamp for it.

        Publishing the very bytes that are served is no error and changes nothing (a caller may retry).
        Raises TrustError (`wrong-threshold`, `bad-signature`, `expired`), InputError (`bad-metadata`,
        `old-targets`, `missing-blob`, `blob-mismatch`, …). Nothing is served on an error.
        """
        with self._lock:
            if self._targets is not None and data == self._read(self._targets):
                return self._published()
            current = self._targets.signed if self._targets else None
            metadata = rules.check_targets(data, self._root.signed, current, now)
            self._link_blobs(metadata.signed)
            self._write(f"{metadata.signed.version}.targets.json", data)
            self._sign_online(metadata, data, now)
            return self._published()

    def publish_root(self, data: bytes, now: datetime, online: OnlineSigners | None = None) -> Published:
        """Serve the next root. `online` are the signers from now on, when it changes the online keys.

        With other online keys, snapshot and timestamp are first signed by the old and the new ones, so that
        a node on either root can follow. Raises as `publish_targets`, and TrustError
        `targets-not-under-root` when the new root would not accept the targets that are served.
        """
        with self._lock:
            if data == self.metadata(f"{self._root.signed.version}.root.json"):
                return self._published()
            metadata = rules.check_root(data, self._root.signed, now)
            merged = merge(self._online, online) if online else self._online
            check_online(metadata.signed, merged)
            self._check_targets_under(metadata.signed)
            self._online = merged
            if self._targets is not None and not verifies_under(
                metadata.signed, self._snapshot, self._timestamp
            ):
                self._sign_online(self._targets, self._read(self._targets), now, metadata.signed)
            self._write(f"{metadata.signed.version}.root.json", data)
            self._root = metadata
            return self._published()

    def refresh(self, now: datetime) -> bool:
        """Sign snapshot and timestamp anew when less than half of their life is left. True when it did."""
        with self._lock:
            if self._targets is None:
                return False
            if not self._due(now):
                return False
            self._sign_online(self._targets, self._read(self._targets), now)
            return True

    # ---- the program that a server hands out

    def sign_config(self, data: bytes) -> bytes:
        """The ed25519 signature (64 bytes) of a key of the timestamp role of the current root over `data`."""
        keyids = self._root.signed.roles["timestamp"].keyids
        for signer in self._online.timestamp:
            if signer.public_key.keyid in keyids:
                return bytes.fromhex(signer.sign(data).signature)
        raise TrustError("no-timestamp-key", "cannot sign a configuration: no timestamp key at hand")

    def embed(self, program: bytes, *, server: str, ca: str, token: str, group: str) -> bytes:
        """`program` with this operator's configuration in its zip comment, instead of any that it had."""
        config = EmbeddedConfig(1, server, ca, json.loads(self.root()), token, group)
        bare, _ = split_program(program)
        return join_program(bare, format_comment(config.encode(), self.sign_config))

    # ---- inside

    def _published(self) -> Published:
        versions = [
            metadata.signed.version if metadata else 0
            for metadata in (self._targets, self._snapshot, self._timestamp)
        ]
        return Published(self._root.signed.version, *versions)

    def _write(self, name: str, data: bytes) -> None:
        write_atomic(self.folder / "metadata" / name, data, disk=self._disk)

    def _read(self, metadata: Metadata[Targets] | Metadata[Snapshot]) -> bytes:
        """The very bytes of a served file."""
        signed = metadata.signed
        return (self.folder / "metadata" / f"{signed.version}.{signed.type}.json").read_bytes()

    def _link_blobs(self, targets: Targets) -> None:
        """Give every target's blob its served name; refuse a target whose blob is absent or altered."""
        folders = set()
        for path, target in targets.targets.items():
            sha256 = rules.sha256_of(path, target)
            served = self.folder / "targets" / target.get_prefixed_paths()[0]
            if served.is_file() and served.stat().st_size == target.length:
                continue  # the name holds the digest, and it was checked when the name was made
            blob = self.folder / "blobs" / sha256
            check_blob(path, blob, sha256, target.length)
            make_folder(served.parent, self._disk)
            try:
                served.unlink(missing_ok=True)
                self._disk.link(blob, served)
            except OSError as error:
                raise failed("link", served, error) from error
            folders.add(served.parent)
        for folder in folders:
            self._disk.sync(folder)

    def _sign_online(
        self, targets: Metadata[Targets], data: bytes, now: datetime, next_root: Root | None = None
    ) -> None:
        """Sign a snapshot of `targets` and a timestamp, one version on each, and serve them.

        With `next_root` they are good under the current root and under that one.
        """
        roots = [self._root.signed, *([next_root] if next_root else [])]
        snapshot = Metadata(
            Snapshot(
                version=self._snapshot.signed.version + 1 if self._snapshot else 1,
                expires=now + self._lifetimes.snapshot,
                meta={"targets.json": meta_file(targets.signed.version, data)},
            )
        )
        snapshot_bytes = sign_under(snapshot, self._online.snapshot, roots)
        timestamp = Metadata(
            Timestamp(
                version=self._timestamp.signed.version + 1 if self._timestamp else 1,
                expires=now + self._lifetimes.timestamp,
                snapshot_meta=meta_file(snapshot.signed.version, snapshot_bytes),
            )
        )
        timestamp_bytes = sign_under(timestamp, self._online.timestamp, roots)
        self._write(f"{snapshot.signed.version}.snapshot.json", snapshot_bytes)
        self._write("timestamp.json", timestamp_bytes)
        self._targets, self._snapshot, self._timestamp = targets, snapshot, timestamp
        self._timestamp_bytes = timestamp_bytes

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

    def _due(self, now: datetime) -> bool:
        """Whether online metadata is over half its life, or not signed by the current root's keys."""
        if not verifies_under(self._root.signed, self._snapshot, self._timestamp):
            return True
        for metadata, life in (
            (self._snapshot, self._lifetimes.snapshot),
            (self._timestamp, self._lifetimes.timestamp),
        ):
            if metadata is None or metadata.signed.expires - now < life / 2:
                return True
        return False

    def _load(self) -> None:
        """Read and verify what is served: the chain of roots, timestamp, snapshot, targets."""
        self._root = load_roots(self.folder / "metadata")
        check_online(self._root.signed, self._online)
        path = self.folder / "metadata" / "timestamp.json"
        if not path.exists():
            return
        data = path.read_bytes()
        timestamp = load_one(path, data, Timestamp)
        snapshot_path = path.with_name(f"{timestamp.signed.snapshot_meta.version}.snapshot.json")
        snapshot = load_one(snapshot_path, bytes_of(snapshot_path), Snapshot)
        version = snapshot.signed.meta["targets.json"].version
        targets_path = path.with_name(f"{version}.targets.json")
        targets = load_one(targets_path, bytes_of(targets_path), Targets)
        rules.check_signatures(targets, self._root.signed, f"root version {self._root.signed.version}")
        self._timestamp, self._snapshot, self._targets = timestamp, snapshot, targets
        self._timestamp_bytes = data
