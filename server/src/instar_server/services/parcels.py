"""Parcels: everything that a node needs to install one target without reaching the artifacts, in one file.

A parcel is an uncompressed tar (USTAR): `parcel.json`, `metadata/<N>.root.json` (every version),
`metadata/timestamp.json`, `metadata/<N>.snapshot.json`, `metadata/<N>.targets.json`, `archive`. Nothing in
it is believed for being in it: a node verifies the metadata as if it had fetched them. It is known by the
SHA-384 of its bytes, and one is made anew when the metadata are, so a transfer that was cut goes on where it was
only while they are the same.

    <data>/parcels/  <key>.tar  <key>.json     the second is written last: without it the first is not complete

All calls block on the disk and may be made from several threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from instar.core.errors import MachineError
from instar_server.domain.errors import NotFound
from instar_server.trust.files import failed, make_folder, write_atomic
from instar_server.trust.records import Served, TargetRecord
from instar_server.trust.repository import Repository

FORMAT = 1
KEEP = 20
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


class Parcels:
    """At most `keep` are kept, those used last; one that is being read may be removed, and is read to its end."""

    def __init__(self, repository: Repository, folder: Path, keep: int = KEEP) -> None:
        self._repository, self._folder, self._keep = repository, folder, keep
        self._lock = threading.Lock()
        self._archives: dict[str, str] = {}  # sha256 -> sha384; the bytes behind the first never change

    def parcel_of(self, target: str) -> Parcel:
        """The parcel of a target as it is served now; made if it is not there.

        Raises NotFound `no-target`, MachineError `blob-missing`, `disk-full`, `disk-failed`.
        """
        with self._lock:
            served = self._repository.served()
            record = self._record(served, target)
            key = _key(served, record)
            made = self._made(key) or self._make(key, served, record)
            self._prune(key)
            return made

    def forget(self, parcel: Parcel) -> None:
        """A node has found it altered: make it anew next time."""
        with self._lock:
            for path in (parcel.path.with_suffix(".json"), parcel.path):
                path.unlink(missing_ok=True)

    def archive_sha384(self, target: str) -> str:
        """SHA-384 of a target's own bytes. Raises as `parcel_of`."""
        record = self._record(self._repository.served(), target)
        known = self._archives.get(record.sha256)
        if known is None:
            with self._archive(record).open("rb") as file:
                known = self._archives[record.sha256] = hashlib.file_digest(file, "sha384").hexdigest()
        return known

    def url_path(self, target: str) -> str:
        """Where the target is served: `/v1/targets/<consistent name>`. Raises NotFound `no-target`."""
        return f"/v1/targets/{_consistent(self._record(self._repository.served(), target))}"

    # ---- inside

    @staticmethod
    def _record(served: Served, target: str) -> TargetRecord:
        record = next((each for each in served.targets if each.path == target), None)
        if record is None or record.custom.get("kind") not in _DIGEST:
            raise NotFound("no-target", f"cannot make a parcel of {target[:200]!r}: it is not published")
        return record

    def _archive(self, record: TargetRecord) -> Path:
        path = self._repository.target_file(_consistent(record))
        if path is None:
            raise MachineError(
                "blob-missing", f"cannot read {record.path}: its file is not in the repository"
            )
        return path

    def _made(self, key: str) -> Parcel | None:
        path = self._folder / f"{key}.tar"
        try:
            said = json.loads(path.with_suffix(".json").read_bytes())
            parcel = Parcel(path, **said)
            if path.stat().st_size != parcel.length:
                return None
            os.utime(path)  # used just now
        except (OSError, ValueError, TypeError):
            return None
        return parcel

    def _make(self, key: str, served: Served, record: TargetRecord) -> Parcel:
        make_folder(self._folder)
        path = self._folder / f"{key}.tar"
        temporary = self._folder / f".{key}.new"
        archive = self._archive(record)
        try:
            sha384 = _write(temporary, served, record, archive)
            length = temporary.stat().st_size
            temporary.rename(path)
        except OSError as error:
            raise failed("make", path, error) from error
        finally:
            temporary.unlink(missing_ok=True)
        custom = record.custom
        digest = str(custom[_DIGEST[custom["kind"]]])
        parcel = Parcel(path, custom["kind"], str(custom["version"]), record.path, digest, sha384, length)
        said = {name: value for name, value in asdict(parcel).items() if name != "path"}
        write_atomic(path.with_suffix(".json"), json.dumps(said).encode())
        return parcel

    def _prune(self, used: str) -> None:
        """Remove the oldest, and what was left by a kill."""
        for left in self._folder.glob(".*.new"):
            left.unlink(missing_ok=True)
        parcels = sorted(self._folder.glob("*.tar"), key=_age, reverse=True)
        for path in parcels[self._keep :]:
            if path.stem != used:
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _key(served: Served, record: TargetRecord) -> str:
    """The timestamp pins everything else by its hashes, except the roots."""
    pinned = hashlib.sha256(f"{FORMAT}:{record.path}:{record.sha256}".encode())
    for name, data in served.files:
        pinned.update(f":{name}:".encode() + hashlib.sha256(data).digest())
    return pinned.hexdigest()[:24]


def _consistent(record: TargetRecord) -> str:
    folder, slash, name = record.path.rpartition("/")
    return f"{folder}{slash}{record.sha256}.{name}"


def _write(path: Path, served: Served, record: TargetRecord, archive: Path) -> str:
    """Write the parcel; its SHA-384. Nothing in it depends on when, where or by whom it was made."""
    custom = record.custom
    said = {
        "format": FORMAT, "kind": custom["kind"], "version": custom["version"],
        "digest": custom[_DIGEST[custom["kind"]]], "target": record.path, "length": record.length,
        "sha256": record.sha256,
    }  # fmt: skip
    small = [("parcel.json", json.dumps(said).encode())]
    small += [(f"metadata/{name}", data) for name, data in served.files]
    with path.open("w+b") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in small:
                tar.addfile(_member(name, len(data)), io.BytesIO(data))
            with archive.open("rb") as source:
                tar.addfile(_member("archive", record.length), source)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        return hashlib.file_digest(file, "sha384").hexdigest()


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member
