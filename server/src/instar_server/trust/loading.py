"""Reading a repository's folder back: who may own it, the chain of roots, what is served beside them."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from instar.core.errors import InputError, MachineError, TrustError
from instar_server.trust import rules
from instar_server.trust.online import Signed


def hold(folder: Path) -> int:
    """Take the folder for this process. The lock lapses with the descriptor."""
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise MachineError("repository-in-use", f"cannot open {folder}: another process uses it") from None
    return fd


def bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise TrustError("repository-damaged", f"cannot open the repository: {path} is missing") from None


def load_one(path: Path, data: bytes, kind: type[rules.T]) -> Metadata[rules.T]:
    try:
        return rules.parse(data, kind)
    except InputError as error:
        raise TrustError("repository-damaged", f"cannot open the repository: {path}: {error.text}") from error


def load_roots(folder: Path) -> Metadata[Root]:
    """The newest root, with the whole chain from the oldest one verified on the way."""
    versions = sorted(int(path.name.split(".")[0]) for path in folder.glob("[0-9]*.root.json"))
    if not versions:
        raise InputError("no-repository", f"cannot open {folder.parent}: no root metadata in it")
    current = _load_root(folder, versions[0])
    for version in versions[1:]:
        previous, current = current, _load_root(folder, version)
        if version != previous.signed.version + 1:
            expected = previous.signed.version + 1
            raise TrustError(
                "repository-damaged",
                f"cannot open the repository: expected root version {expected}, got {version}",
            )
        rules.check_signatures(current, previous.signed, f"root version {previous.signed.version}")
    return current


def _load_root(folder: Path, version: int) -> Metadata[Root]:
    path = folder / f"{version}.root.json"
    metadata = load_one(path, path.read_bytes(), Root)
    rules.check_signatures(metadata, metadata.signed, "this root itself")
    return metadata


def load_served(folder: Path, root: Root) -> tuple[Metadata[Targets], Signed] | None:
    """What is served beside the roots: the targets, and what the server signed for them. None: nothing yet.

    Raises TrustError when a file is missing or damaged, or the targets are not signed under `root`; whether the
    server's own signatures are, the caller finds out.
    """
    path = folder / "timestamp.json"
    if not path.exists():
        return None
    data = path.read_bytes()
    timestamp = load_one(path, data, Timestamp)
    snapshot_path = folder / f"{timestamp.signed.snapshot_meta.version}.snapshot.json"
    snapshot_bytes = bytes_of(snapshot_path)
    snapshot = load_one(snapshot_path, snapshot_bytes, Snapshot)
    targets_path = folder / f"{snapshot.signed.meta['targets.json'].version}.targets.json"
    targets = load_one(targets_path, bytes_of(targets_path), Targets)
    rules.check_signatures(targets, root, f"root version {root.version}")
    return targets, Signed(snapshot, snapshot_bytes, timestamp, data)
