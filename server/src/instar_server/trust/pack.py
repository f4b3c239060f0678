"""A release archive from a built `instar.pyz`: the same program gives the same bytes (with the same zlib).

release.tar.gz = manifest.json, then instar.pyz (mode 0755)
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from dataclasses import dataclass
from typing import Any

from instar.core.errors import InputError
from instar.trust.manifest import NAME, FileEntry, Manifest
from instar.trust.program import program_digest, split_program

PROGRAM = "instar.pyz"
PYTHON = ">=3.11"
GZIP_LEVEL = 9


@dataclass(frozen=True, slots=True)
class Release:
    """An archive, the target path under which it is published, and what its signers say of it."""

    path: str
    archive: bytes
    sha256: str
    custom: dict[str, Any]


def pack_release(program: bytes, version: str) -> Release:
    """Pack `program`, without any embedded configuration. Raises InputError `bad-program`, `bad-manifest`."""
    bare, _ = split_program(program)
    digest = program_digest(bare)
    entry = FileEntry(PROGRAM, len(bare), hashlib.sha256(bare).hexdigest(), "0755")
    manifest = Manifest("instar", version, digest, (entry,)).encode()
    Manifest.decode(manifest)  # what nodes would refuse is not packed
    archive = _compressed([(NAME, manifest, 0o644), (PROGRAM, bare, 0o755)])
    custom = {"kind": "node", "version": version, "program_digest": digest, "python": PYTHON}
    return Release(f"node/instar-{version}.tar.gz", archive, hashlib.sha256(archive).hexdigest(), custom)


def release_of(archive: bytes) -> Release:
    """The release in an archive that `pack_release` made, checked. Raises InputError `bad-release`."""
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            files = {member.name: tar.extractfile(member) for member in tar.getmembers() if member.isfile()}
            contents = {name: file.read() for name, file in files.items() if file}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError("bad-release", f"cannot read the release archive: {error}") from error
    if set(contents) != {NAME, PROGRAM}:
        got = ", ".join(sorted(contents))
        raise InputError("bad-release", f"cannot use the release: expected {NAME} and {PROGRAM}, got {got}")
    manifest = Manifest.decode(contents[NAME])
    entry = manifest.file(PROGRAM)
    program = contents[PROGRAM]
    digest = program_digest(program)
    sha256 = hashlib.sha256(program).hexdigest()
    if entry is None or entry.sha256 != sha256 or digest != manifest.program_digest:
        raise InputError("bad-release", f"cannot use the release: {PROGRAM} is not what its manifest lists")
    custom = {"kind": "node", "version": manifest.version, "program_digest": digest, "python": PYTHON}
    path = f"node/instar-{manifest.version}.tar.gz"
    return Release(path, archive, hashlib.sha256(archive).hexdigest(), custom)


def _compressed(files: list[tuple[str, bytes, int]]) -> bytes:
    """tar.gz with nothing in it that depends on when, where or by whom it was made."""
    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data, mode in files:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), mode
            tar.addfile(member, io.BytesIO(data))
    return gzip.compress(tar_bytes.getvalue(), GZIP_LEVEL, mtime=0)
