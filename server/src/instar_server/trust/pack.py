"""Archives that can be signed: a release of the node program, or of a module; and recovery cores.

    node      manifest.json, then instar.pyz (mode 0755)
    module    manifest.json, then the files that it lists, in the order of their paths
    recovery  the core itself: a zipapp without a comment, run by nodes just as it is

The same input gives the same bytes (with the same zlib). `release_of` tells the first two apart by the manifest.
What a module's manifest is made from is in `instar_server.trust.module_source`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from instar.core.errors import InputError, TrustError
from instar.core.releases import version_key
from instar.trust.archive import ArchiveRules, Listing
from instar.trust.manifest import NAME, FileEntry, Manifest
from instar.trust.module import KIND, ModuleManifest, module_digest
from instar.trust.program import program_digest, split_program

PROGRAM = "instar.pyz"
PYTHON = ">=3.11"
GZIP_LEVEL = 9
GZIP = b"\x1f\x8b"
RECOVERY = "recovery"
CORE_ENTRY = b"instar.rescue"  # what a core's __main__.py starts
CORE_NAME = re.compile(r"(?:core|instar-recovery)(?:-(?P<version>\d[0-9A-Za-z.-]*))?\.pyz")
VERSION_LINE = re.compile(rb'^VERSION\s*=\s*"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Release:
    """An archive, the target path under which it is published, and what its signers say of it."""

    path: str
    archive: bytes
    sha256: str
    custom: dict[str, Any]

    @property
    def digest(self) -> str:
        """What nodes know it by: the program digest, or the module digest."""
        return str(self.custom["program_digest" if self.custom["kind"] == "node" else "digest"])


def pack_release(program: bytes, version: str, level: int = GZIP_LEVEL) -> Release:
    """Pack `program`, without any embedded configuration; `level` is gzip's, 1 (quick) to 9 (small).

    Raises InputError `bad-program`, `bad-manifest`.
    """
    bare, _ = split_program(program)
    entry = FileEntry(PROGRAM, len(bare), hashlib.sha256(bare).hexdigest(), "0755")
    manifest = Manifest("instar", version, program_digest(bare), (entry,))
    Manifest.decode(manifest.encode())  # what nodes would refuse is not packed
    return _node(manifest, compressed(manifest.encode(), manifest, {PROGRAM: bare}, level))


def pack_files(manifest: ModuleManifest, files: Mapping[str, bytes]) -> Release:
    """Pack a module: its manifest, and its files by path. Raises InputError, TrustError as nodes would."""
    data = manifest.encode()
    read = ModuleManifest.decode(data)
    ArchiveRules().manifest_read(read)
    return _module(read, data, compressed(data, read, files))


def pack_recovery(core: bytes, version: str) -> Release:
    """A recovery core as it is. Raises InputError `bad-program`, `bad-version`, `bad-release`."""
    version_key(version)
    _, comment = split_program(core)
    if comment:
        raise InputError("bad-release", "cannot use the recovery core: it has a zip comment")
    custom = {"kind": RECOVERY, "version": version, "digest": program_digest(core)}
    path = f"{RECOVERY}/core-{version}.pyz"
    return Release(path, core, hashlib.sha256(core).hexdigest(), custom)


def release_of(archive: bytes, name: str = "") -> Release:
    """The release in an archive that one of these made, checked. `name` is its file's, for a recovery core
    that does not say its version itself. Raises InputError `bad-release`."""
    if not archive.startswith(GZIP) and zipfile.is_zipfile(io.BytesIO(archive)):
        return _core(archive, name)
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            return _read(tar, archive)
    except (tarfile.TarError, OSError, EOFError, zlib.error, TrustError) as error:
        raise InputError("bad-release", f"cannot read the release archive: {error}") from error


def _core(core: bytes, name: str) -> Release:
    """A recovery core, known by what it starts, or by the name of its file. No node program is one: it has no
    business being run in that place."""
    named = CORE_NAME.fullmatch(name)
    with zipfile.ZipFile(io.BytesIO(core)) as archive:
        texts = {
            member: archive.read(member)
            for member in ("__main__.py", "instar/version.py")
            if member in archive.namelist()
        }
    if CORE_ENTRY not in texts.get("__main__.py", b"") and named is None:
        text = "expected a release archive or a recovery core, got a program of another kind"
        raise InputError("bad-release", f"cannot use {name or 'the file'}: {text}")
    stated = VERSION_LINE.search(texts.get("instar/version.py", b""))
    version = stated[1].decode() if stated else (named["version"] or "") if named else ""
    return pack_recovery(core, version)


def _read(tar: tarfile.TarFile, archive: bytes) -> Release:
    """Read it as a node does, so that nothing is published that a node would refuse."""
    rules = ArchiveRules()
    data, manifest, contents = b"", None, {}
    for member in tar:
        entry = rules.admit(member)
        file = tar.extractfile(member)
        body = file.read(member.size) if file else b""
        if entry is None:
            data, manifest = body, _manifest(body)
            rules.manifest_read(manifest)
        else:
            entry.check(len(body), hashlib.sha256(body).hexdigest())
            contents[entry.path] = body
    rules.finish()
    if isinstance(manifest, ModuleManifest):
        return _module(manifest, data, archive)
    assert isinstance(manifest, Manifest)
    if set(contents) != {PROGRAM}:
        got = ", ".join(sorted({NAME, *contents}))
        raise InputError("bad-release", f"cannot use the release: expected {NAME} and {PROGRAM}, got {got}")
    if program_digest(contents[PROGRAM]) != manifest.program_digest:
        raise InputError("bad-release", f"cannot use the release: {PROGRAM} is not what its manifest lists")
    return _node(manifest, archive)


def _manifest(data: bytes) -> Manifest | ModuleManifest:
    try:
        kind = json.loads(data).get("kind")
    except (ValueError, AttributeError, RecursionError):
        kind = None  # the readers say what is wrong
    return ModuleManifest.decode(data) if kind == KIND else Manifest.decode(data)


def _node(manifest: Manifest, archive: bytes) -> Release:
    version = manifest.version
    custom = {
        "kind": "node", "version": version, "program_digest": manifest.program_digest, "python": PYTHON,
    }  # fmt: skip
    return Release(f"node/instar-{version}.tar.gz", archive, hashlib.sha256(archive).hexdigest(), custom)


def _module(manifest: ModuleManifest, data: bytes, archive: bytes) -> Release:
    name, version = manifest.name, manifest.version
    custom = {
        "kind": KIND, "name": name, "version": version, "digest": module_digest(data), "runs": manifest.runs,
        "mode": manifest.mode,
    }  # fmt: skip
    return Release(f"module/{name}-{version}.tar.gz", archive, hashlib.sha256(archive).hexdigest(), custom)


def compressed(
    manifest: bytes, listing: Listing, contents: Mapping[str, bytes], level: int = GZIP_LEVEL
) -> bytes:
    """tar.gz with nothing in it that depends on when, where or by whom it was made."""
    tar_bytes = io.BytesIO()
    entries = sorted(listing.files, key=lambda entry: entry.path)
    files = [(NAME, manifest, 0o644), *((e.path, contents[e.path], e.mode_bits) for e in entries)]
    with tarfile.open(fileobj=tar_bytes, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data, mode in files:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), mode
            try:
                tar.addfile(member, io.BytesIO(data))
            except ValueError as error:  # the one header that is used has room for so much
                raise InputError("bad-path", f"cannot pack {name!r:.300}: {error}") from error
    return gzip.compress(tar_bytes.getvalue(), level, mtime=0)
