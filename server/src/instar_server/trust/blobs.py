"""The files behind targets: uploaded under their digest, served under the names that signed metadata give them.

Blocks on the disk. The caller sees to it that names are given by one thread at a time.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from tuf.api.metadata import Targets

from instar.core.errors import InputError
from instar.trust.paths import check_path
from instar_server.trust import rules
from instar_server.trust.files import Disk, failed, make_folder
from instar_server.trust.records import Blob

UNFINISHED = ".upload-"


class Blobs:
    """`blobs/` and `targets/` of a repository's folder."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._blobs, self._targets, self._disk = folder / "blobs", folder / "targets", disk

    @property
    def staging(self) -> Path:
        """The folder in which to make the temporary file for `add`, so that it can be renamed."""
        return self._blobs

    def new_file(self) -> Path:
        """A path for a temporary file that nobody else has. What is left there is for `sweep`."""
        return self.staging / f"{UNFINISHED}{secrets.token_hex(8)}"

    def sweep(self) -> None:
        """Remove temporary files that a kill has left. Before the first is made."""
        for left in self.staging.glob(f"{UNFINISHED}*"):
            left.unlink()

    def add(self, temporary: Path, expected_sha256: str | None = None) -> Blob:
        """Take over the uploaded file `temporary` (moved when on the same file system); idempotent. Where the disk,
        or somebody, has changed what is served of it, an upload puts that right.

        Raises InputError `blob-mismatch` when it is not what the uploader said; `temporary` then stays.
        """
        sha256, length = _digest_of(temporary)
        if expected_sha256 is not None and expected_sha256 != sha256:
            raise InputError(
                "blob-mismatch", f"cannot store the blob: expected sha256 {expected_sha256}, got {sha256}"
            )
        final = self._blobs / sha256
        try:
            self._disk.sync(temporary)
            self._disk.rename(temporary, final)
            self._disk.sync(final.parent)
            for served in self._targets.rglob(f"{sha256}.*"):
                self._renew(served, final)
        except OSError as error:
            raise failed("store", final, error) from error
        return Blob(sha256, length)

    def _renew(self, served: Path, blob: Path) -> None:
        """Give a served name to `blob`, which is what it should be; whoever reads meanwhile sees one or the other."""
        temporary = self.new_file()
        self._disk.link(blob, temporary)
        self._disk.rename(temporary, served)
        self._disk.sync(served.parent)

    def serve(self, targets: Targets) -> None:
        """Give every target's blob its served name. Raises InputError `missing-blob`, `blob-mismatch`."""
        folders = set()
        for path, target in targets.targets.items():
            sha256 = rules.sha256_of(path, target)
            served = self._targets / target.get_prefixed_paths()[0]
            if served.is_file() and served.stat().st_size == target.length:
                continue  # the name holds the digest, and it was checked when the name was made
            blob = self._blobs / sha256
            _check(path, blob, sha256, target.length)
            make_folder(served.parent, self._disk)
            try:
                served.unlink(missing_ok=True)
                self._disk.link(blob, served)
            except OSError as error:
                raise failed("link", served, error) from error
            folders.add(served.parent)
        for folder in folders:
            self._disk.sync(folder)

    def served(self, url_path: str) -> Path | None:
        """The file behind `<dir>/<sha256>.<file>`; None when absent or unsafe."""
        try:
            check_path(url_path, "target")
        except InputError:
            return None
        path = self._targets / url_path
        return path if path.is_file() else None


def _digest_of(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()


def _check(target: str, blob: Path, sha256: str, length: int) -> None:
    """Refuse a blob that is absent or altered."""
    if not blob.is_file():
        raise InputError(
            "missing-blob", f"cannot publish {target}: its blob {sha256[:12]} is not here; upload it first"
        )
    got, size = _digest_of(blob)
    if size != length:
        raise InputError("blob-mismatch", f"cannot publish {target}: expected {length} bytes, got {size}")
    if got != sha256:
        raise InputError("blob-mismatch", f"cannot publish {target}: expected sha256 {sha256}, got {got}")
