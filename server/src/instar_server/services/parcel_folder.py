"""Parcels as files: everything that a node needs to install one target without reaching the artifacts, in one.

A parcel is an uncompressed tar (USTAR): `parcel.json`, `metadata/<N>.root.json` (every version),
`metadata/timestamp.json`, `metadata/<N>.snapshot.json`, `metadata/<N>.targets.json`, `archive`. Nothing in
it is believed for being in it: a node verifies the metadata as if it had fetched them. It is known by the
SHA-384 of its bytes, and one is made anew when the metadata are, so a transfer that was cut goes on where it was
only while they are the same.

    <data>/parcels/  <metadata>-<target>.tar  <metadata>-<target>.json
                     the second is written last: without it the first is not complete

All calls block on the disk, and but for `stop` one thread at a time may make them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from instar.core.errors import MachineError
from instar_server.domain.errors import NotFound
from instar_server.trust.files import failed, make_folder, write_atomic
from instar_server.trust.records import Served, TargetRecord
from instar_server.trust.repository import Repository

FORMAT = 1
KEEP = 20
OLD_S = 60.0  # how long one of older metadata is kept after its last use: somebody may be about to open it
PIECE = 1_048_576  # bytes read at a time; between two of them making can be stopped
_DIGEST = {"node": "program_digest", "recovery": "digest"}  # where each kind's custom has its program digest


@dataclass(frozen=True, slots=True)
class Parcel:
    """`sha384` and `length` are of the parcel; `digest` is the program digest of what is in it."""

    path: Path
    kind: str
    version: str
    target: str
    digest: str
    sha384: str
    length: int


class ParcelFolder:
    """At most `keep` are kept, those used last. One that is open may be removed, and is read to its end."""

    def __init__(self, repository: Repository, folder: Path, keep: int = KEEP) -> None:
        self._repository, self._folder, self._keep = repository, folder, keep
        self._stopped = threading.Event()

    def parcel_of(self, target: str) -> Parcel:
        """The parcel of a target as it is served now; made if it is not there.

        Raises NotFound `no-target`, MachineError `blob-missing`, `altered-blob`, `disk-full`, `disk-failed`, `stopped`.
        """
        served = self._repository.served()
        record = find(served.targets, target)
        name = _name(served, record)
        return self._made(name) or self._make(name, served, record)

    def remove_if_altered(self, parcel: Parcel) -> bool:
        """Whether its bytes are not the recorded ones any more; it is then made anew next time."""
        try:
            with parcel.path.open("rb") as file:
                if hashlib.file_digest(file, "sha384").hexdigest() == parcel.sha384:
                    return False
        except OSError:
            pass  # it cannot be read: another one may be
        with contextlib.suppress(OSError):
            _remove(parcel.path)
        return True

    def archive_sha384(self, record: TargetRecord) -> str:
        """SHA-384 of a target's own bytes. Raises MachineError `blob-missing`, `altered-blob`, `disk-failed`."""
        path, sha256, sha384 = self._archive(record), hashlib.sha256(), hashlib.sha384()
        try:
            with path.open("rb") as file:
                while data := file.read(PIECE):
                    sha256.update(data)
                    sha384.update(data)
        except OSError as error:
            raise failed("read", path, error) from error
        _check_blob(record, sha256.hexdigest())
        return sha384.hexdigest()

    def stop(self) -> None:
        """Let the one that is being made end early, with MachineError `stopped`. Any thread may call it."""
        self._stopped.set()

    # ---- inside

    def _archive(self, record: TargetRecord) -> Path:
        path = self._repository.target_file(consistent(record))
        if path is None:
            raise MachineError(
                "blob-missing", f"cannot read {record.path}: its file is not in the repository"
            )
        return path

    def _made(self, name: str) -> Parcel | None:
        path = self._folder / f"{name}.tar"
        try:
            said = json.loads(path.with_suffix(".json").read_bytes())
            parcel = Parcel(path, **said)
            if path.stat().st_size != parcel.length:
                return None
            os.utime(path)  # used just now
        except (OSError, ValueError, TypeError):
            return None
        return parcel

    def _make(self, name: str, served: Served, record: TargetRecord) -> Parcel:
        make_folder(self._folder)
        path, temporary = self._folder / f"{name}.tar", self._folder / f".{name}.new"
        archive = self._archive(record)
        small = _small_members(served, record)
        length = _tar_length([len(data) for _, data in small] + [record.length])
        try:
            self._prune(self._keep - 1, path)
            self._check_room(record.path, length)
            sha384 = self._write(temporary, small, record, archive, length)
            temporary.rename(path)
        except OSError as error:
            raise failed("make", path, error) from error
        finally:
            temporary.unlink(missing_ok=True)
        custom = record.custom
        digest = str(custom[_DIGEST[custom["kind"]]])
        parcel = Parcel(path, custom["kind"], str(custom["version"]), record.path, digest, sha384, length)
        said = {key: value for key, value in asdict(parcel).items() if key != "path"}
        write_atomic(path.with_suffix(".json"), json.dumps(said).encode())
        return parcel

    def _check_room(self, target: str, needed: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise MachineError(
                "disk-full",
                f"cannot make the parcel of {target}: expected {needed} bytes free in {self._folder}, got {free}",
            )

    def _write(
        self, path: Path, small: list[tuple[str, bytes]], record: TargetRecord, archive: Path, length: int
    ) -> str:
        """Write the parcel; its SHA-384."""
        sha384 = hashlib.sha384()
        with path.open("wb") as file, archive.open("rb") as source:
            for piece in _pieces(small, record, source, length):
                if self._stopped.is_set():
                    raise MachineError("stopped", "cannot make the parcel: the server is stopping")
                sha384.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        return sha384.hexdigest()

    def _prune(self, keep: int, path: Path) -> None:
        """Make room for `path`: remove all but the last `keep`, those of older metadata that nobody has used for
        OLD_S, and what was left by a kill."""
        for left in self._folder.glob(".*.new"):
            left.unlink(missing_ok=True)
        metadata = path.name.partition("-")[0]
        ages = {each: _used(each) for each in self._folder.glob("*.tar") if each != path}
        now = time.time()  # as the file system counts it
        for n, each in enumerate(sorted(ages, key=ages.__getitem__, reverse=True)):
            old = each.name.partition("-")[0] != metadata and now - ages[each] > OLD_S
            if n >= keep or old:
                _remove(each)


def find(targets: list[TargetRecord], target: str) -> TargetRecord:
    """The target, if parcels are made of its kind. Raises NotFound `no-target`."""
    record = next((each for each in targets if each.path == target), None)
    if record is None or record.custom.get("kind") not in _DIGEST:
        raise NotFound("no-target", f"cannot make a parcel of {target[:200]!r}: it is not published")
    return record


def consistent(record: TargetRecord) -> str:
    """The name by which a target is served: `<folder>/<sha256>.<file>`."""
    folder, slash, name = record.path.rpartition("/")
    return f"{folder}{slash}{record.sha256}.{name}"


def _remove(path: Path) -> None:
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _used(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _name(served: Served, record: TargetRecord) -> str:
    """The timestamp pins everything else by its hashes, except the roots."""
    metadata = hashlib.sha256(f"{FORMAT}".encode())
    for name, data in served.files:
        metadata.update(f":{name}:".encode() + hashlib.sha256(data).digest())
    target = hashlib.sha256(f"{record.path}:{record.sha256}".encode())
    return f"{metadata.hexdigest()[:24]}-{target.hexdigest()[:24]}"


def _small_members(served: Served, record: TargetRecord) -> list[tuple[str, bytes]]:
    """All but the archive."""
    custom = record.custom
    said = {
        "format": FORMAT, "kind": custom["kind"], "version": custom["version"],
        "digest": custom[_DIGEST[custom["kind"]]], "target": record.path, "length": record.length,
        "sha256": record.sha256,
    }  # fmt: skip
    return [
        ("parcel.json", json.dumps(said).encode()),
        *((f"metadata/{name}", data) for name, data in served.files),
    ]


def _tar_length(sizes: list[int]) -> int:
    """Of a tar with members of these sizes: a header each, all in whole blocks, and whole records at the end."""
    blocks = sum(1 + _up(size, tarfile.BLOCKSIZE) // tarfile.BLOCKSIZE for size in sizes)
    return _up((blocks + 2) * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)


def _pieces(
    small: list[tuple[str, bytes]], record: TargetRecord, source: BinaryIO, length: int
) -> Iterator[bytes]:
    """The tar, of `length` bytes. Nothing in it depends on when, where or by whom it was made.

    Raises OSError, MachineError `altered-blob`: what no node can use is not kept, and not sent.
    """
    for name, data in small:
        head = _header(name, len(data)) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
        length -= len(head)
        yield head
    yield _header("archive", record.length)
    left, sha256 = record.length, hashlib.sha256()
    while left:
        data = source.read(min(PIECE, left))
        if not data:
            raise OSError(f"{record.path} is {left} bytes too short")
        left -= len(data)
        sha256.update(data)
        yield data
    _check_blob(record, sha256.hexdigest())
    yield bytes(length - tarfile.BLOCKSIZE - record.length)


def _check_blob(record: TargetRecord, got: str) -> None:
    """Its bytes were right when they were published; the disk, or somebody, may have changed them since."""
    if got != record.sha256:
        text = f"expected sha256 {record.sha256[:16]}… of its file in the repository, got {got[:16]}…; publish it again"
        raise MachineError("altered-blob", f"cannot use {record.path}: {text}")


def _up(size: int, unit: int) -> int:
    return size + -size % unit


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)
