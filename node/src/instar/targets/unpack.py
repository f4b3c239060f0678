"""A release's archive to its final folder: poisoned first, every file checked, marked valid last.

Nothing of the archive decides where bytes go except a path that `ArchiveRules` admitted.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import zlib
from pathlib import Path
from typing import IO

from instar.core.errors import InputError, TrustError
from instar.core.reason import Reason
from instar.core.releases import Release
from instar.engine.target import Failed
from instar.host.files import Disk, failed, make_folder, remove, remove_tree
from instar.host.line import MANIFEST, VALID, Line
from instar.host.points import reach
from instar.targets.contents import NODE, Contents
from instar.trust.archive import ArchiveRules, Listing
from instar.trust.manifest import MAX_SIZE, FileEntry

CHUNK = 1 << 20
LARGE = 4 << 20  # bytes of a file that is not held in memory


def unpack(archive: Path, line: Line, release: Release, disk: Disk, contents: Contents = NODE) -> None:
    """Make `line`'s folder of `release` from `archive`. Idempotent: a valid one is left as it is.

    Raises TrustError (the archive is not what it should be; nothing valid is left) or MachineError.
    """
    if line.is_valid(release.name):
        return
    folder = line.folder(release.name)
    remove(folder / VALID, disk) if folder.exists() else None
    unpack_into(folder, archive, release, disk, contents)
    line.mark_valid(release.name)
    disk.sync_folder(line.layout.releases)


def replace_files(beside: Path, line: Line, release: str, disk: Disk, contents: Contents = NODE) -> None:
    """Move the files of the folder `beside` over those of a valid release. Killed anywhere, the release is valid:
    old and new have the same bytes, by the same manifest. Whoever calls holds the line's lock.

    Raises Failed `other-manifest` (nothing was changed) where it is not the same, MachineError.
    """
    folder = line.folder(release)
    try:
        data = (beside / MANIFEST).read_bytes()
        if data != (folder / MANIFEST).read_bytes():
            text = f"cannot put {release} there anew while it is sound: its manifest is another one"
            raise Failed(Reason("other-manifest", text), blame=False)
        paths = [entry.path for entry in contents.read(data).files]
        for path in (*paths, MANIFEST):
            disk.rename(beside / path, folder / path)
            reach("replace:file")
        for each in sorted({folder, *((folder / path).parent for path in paths)}):
            disk.sync_folder(each)
    except OSError as error:
        raise failed("replace", folder, error) from error
    reach("replace:files")
    line.mark_valid(release)


def unpack_into(folder: Path, archive: Path, release: Release, disk: Disk, contents: Contents = NODE) -> None:
    """Make `folder` anew: the files of `release`, checked, without a marker. Raises as `unpack`."""
    remove_tree(folder, disk)
    make_folder(folder, 0o755, disk)
    reach("unpack:folder")
    try:
        manifest = _extract(archive, folder, disk, contents)
        contents.check((folder / MANIFEST).read_bytes(), folder, release)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, InputError) as error:
        raise TrustError("bad-archive", f"cannot unpack {archive.name}: {error}") from None
    except FileNotFoundError as error:
        raise TrustError("bad-archive", f"cannot unpack {archive.name}: no {error.filename}") from None
    except OSError as error:
        raise failed("unpack", folder, error) from error
    for each in sorted({folder, *((folder / entry.path).parent for entry in manifest.files)}):
        disk.sync_folder(each)
    reach("unpack:files")


def _extract(archive: Path, folder: Path, disk: Disk, contents: Contents) -> Listing:
    rules = ArchiveRules()
    manifest: Listing | None = None
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            entry = rules.admit(member)
            source = tar.extractfile(member)
            if source is None:
                raise TrustError("bad-archive", f"cannot unpack {member.name[:80]!r}: it has no bytes")
            if entry is None:
                data = source.read(MAX_SIZE + 1)
                manifest = contents.read(data)
                rules.manifest_read(manifest)
                disk.write_new(folder / MANIFEST, data, 0o444)
            else:
                _file(source, folder, entry, disk)
    rules.finish()
    if manifest is None:
        raise TrustError("bad-archive", "cannot unpack: no manifest")
    return manifest


def _file(source: IO[bytes], folder: Path, entry: FileEntry, disk: Disk) -> None:
    path, mode = folder / entry.path, entry.mode_bits & ~0o222
    make_folder(path.parent, 0o755, disk)
    if entry.size > LARGE:
        _large_file(source, path, entry, mode, disk)
    else:
        data = source.read(entry.size + 1)
        entry.check(len(data), hashlib.sha256(data).hexdigest())
        disk.write_new(path, data, mode)
    reach("unpack:file")


def _large_file(source: IO[bytes], path: Path, entry: FileEntry, mode: int, disk: Disk) -> None:
    """Piece by piece, so that a release of any size takes the same memory."""
    digest, size = hashlib.sha256(), 0
    disk.write_new(path, b"", 0o600)
    while chunk := source.read(min(CHUNK, entry.size + 1 - size)):
        disk.append(path, chunk, 0o600)
        digest.update(chunk)
        size += len(chunk)
    entry.check(size, digest.hexdigest())
    os.chmod(path, mode)
    disk.sync_file(path)


def hash_file(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()
