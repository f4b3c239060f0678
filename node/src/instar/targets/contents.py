"""The kinds of release that a line can hold: what is signed of each, and what its manifest must say."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

from instar.core.errors import TrustError
from instar.core.releases import Release
from instar.host.line import PROGRAM
from instar.trust.archive import Listing
from instar.trust.manifest import Manifest
from instar.trust.module import KIND, ModuleManifest, module_release
from instar.trust.program import TAIL, digested_length

CHUNK = 1 << 20


class Contents(Protocol):
    """One kind of release. Stateless."""

    def promise(self, release: Release) -> dict[str, str]:
        """The fields that the signed target's `custom` must have for this release to be meant by it."""

    def read(self, manifest: bytes) -> Listing:
        """The files that `manifest.json` lists. Raises InputError."""

    def check(self, manifest: bytes, folder: Path, release: Release) -> None:
        """Raise TrustError unless this manifest, its files lying in `folder`, is that of `release`."""

    def release(self, manifest: bytes) -> Release:
        """What the manifest is of. Raises InputError."""


class NodeContents:
    """A release of the node program: known by the digest of its `instar.pyz`."""

    def promise(self, release: Release) -> dict[str, str]:
        return {"version": release.version, "program_digest": release.digest}

    def read(self, manifest: bytes) -> Listing:
        return Manifest.decode(manifest)

    def check(self, manifest: bytes, folder: Path, release: Release) -> None:
        Manifest.decode(manifest).check_target(release.version, release.digest)
        digest = _program_digest(folder / PROGRAM)
        if digest != release.digest:
            text = f"cannot trust {PROGRAM}: expected program digest {release.digest}, got {digest}"
            raise TrustError("altered-program", text)

    def release(self, manifest: bytes) -> Release:
        found = Manifest.decode(manifest)
        return Release(found.version, found.program_digest)


class ModuleContents:
    """A release of one module: known by the digest of its manifest, which holds that of every file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def promise(self, release: Release) -> dict[str, str]:
        return {"kind": KIND, "name": self.name, "version": release.version, "digest": release.digest}

    def read(self, manifest: bytes) -> Listing:
        return ModuleManifest.decode(manifest)

    def check(self, manifest: bytes, folder: Path, release: Release) -> None:
        found = ModuleManifest.decode(manifest)
        if found.name != self.name:
            text = f"cannot trust the manifest: expected module {self.name}, got {found.name}"
            raise TrustError("altered-manifest", text)
        found.check_target(release.version, release.digest, manifest)

    def release(self, manifest: bytes) -> Release:
        return module_release(ModuleManifest.decode(manifest), manifest)


def _program_digest(path: Path) -> str:
    """As trust.program.program_digest, in constant memory. Raises InputError `bad-program`, OSError."""
    digest = hashlib.sha384()
    with path.open("rb") as file:
        before = max(0, file.seek(0, 2) - TAIL)
        file.seek(before)
        left = digested_length(file.read(TAIL), before)
        file.seek(0)
        while chunk := file.read(min(CHUNK, left)):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


NODE = NodeContents()
