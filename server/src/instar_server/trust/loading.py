"""Reading a repository's folder back: who may own it, the chain of roots, one file of a role."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from tuf.api.metadata import Metadata, MetaFile, Root

from instar.core.errors import InputError, MachineError, TrustError
from instar_server.trust import rules


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


def meta_file(version: int, data: bytes) -> MetaFile:
    return MetaFile(version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})


def digest_of(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()


def check_blob(target: str, blob: Path, sha256: str, length: int) -> None:
    if not blob.is_file():
        raise InputError(
            "missing-blob", f"cannot publish {target}: its blob {sha256[:12]} is not here; upload it first"
        )
    got, size = digest_of(blob)
    if size != length:
        raise InputError("blob-mismatch", f"cannot publish {target}: expected {length} bytes, got {size}")
    if got != sha256:
        raise InputError("blob-mismatch", f"cannot publish {target}: expected sha256 {sha256}, got {got}")
