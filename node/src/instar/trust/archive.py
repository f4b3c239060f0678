"""What a release archive may hold: exactly `manifest.json`, first, and the files that it lists.

Pure checks of what a tar reader says of each member; who extracts asks before it writes:

    rules = ArchiveRules()
    for member in tar:                       # tarfile.TarInfo has the fields of Member
        entry = rules.admit(member)          # raises TrustError; None for the manifest itself
        if entry is None:
            rules.manifest_read(Manifest.decode(tar.extractfile(member).read()))  # or a module's
        else:
            ... write entry.size bytes to entry.path, then entry.check(size, sha256)
    rules.finish()
"""

from __future__ import annotations

from typing import Protocol

from instar.core.errors import InputError, TrustError
from instar.trust import manifest as manifests
from instar.trust.manifest import FileEntry
from instar.trust.paths import check_path

MAX_TOTAL = 512 * 1024 * 1024  # bytes of all files together
CODE = "bad-archive"
KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a folder",
    b"6": "a pipe",
}


class Member(Protocol):
    """The fields of `tarfile.TarInfo` that count."""

    name: str
    type: bytes
    size: int
    linkname: str


class Listing(Protocol):
    """What counts of a manifest, whatever it is the manifest of."""

    @property
    def files(self) -> tuple[FileEntry, ...]: ...

    def file(self, path: str) -> FileEntry | None: ...


class ArchiveRules:
    """Admits one member after the other. Holds what was seen; no I/O."""

    def __init__(self, max_total: int = MAX_TOTAL) -> None:
        self._max_total = max_total
        self._manifest: Listing | None = None
        self._seen: set[str] = set()

    def admit(self, member: Member) -> FileEntry | None:
        """The manifest's entry for `member`, or None for the manifest itself.

        Raises TrustError `bad-archive` for anything but a listed regular file of the listed size.
        """
        name = member.name
        try:
            check_path(name, "archive")
        except InputError as error:
            raise TrustError(CODE, error.text) from error
        if member.type not in (b"0", b"\0"):
            kind = KINDS.get(member.type, f"of the type {member.type!r}")
            raise _refused(name, f"expected a regular file, got {kind}")
        if member.linkname:
            raise _refused(name, f"a regular file with the link {member.linkname[:80]!r}")
        if name in self._seen:
            raise _refused(name, "it stands there twice")
        self._seen.add(name)
        if self._manifest is None:
            self._check_first(member)
            return None
        entry = self._manifest.file(name)
        if entry is None:
            raise _refused(name, "the manifest does not list it")
        if member.size != entry.size:
            raise _refused(name, f"expected {entry.size} bytes, got {member.size}")
        return entry

    def manifest_read(self, manifest: Listing) -> None:
        """Say what the manifest holds; raises TrustError when it promises more than the limit."""
        total = sum(file.size for file in manifest.files)
        if total > self._max_total:
            raise TrustError(CODE, f"cannot unpack the archive: at most {self._max_total} bytes, got {total}")
        self._manifest = manifest

    def finish(self) -> None:
        """Raise TrustError when the archive lacks the manifest or a file that it lists."""
        if self._manifest is None:
            raise TrustError(CODE, f"cannot unpack the archive: it has no {manifests.NAME}")
        absent = [file.path for file in self._manifest.files if file.path not in self._seen]
        if absent:
            raise _refused(absent[0], "the manifest lists it, but it is not there")

    def _check_first(self, member: Member) -> None:
        if member.name != manifests.NAME:
            raise _refused(member.name, f"expected {manifests.NAME} first")
        if member.size > manifests.MAX_SIZE:
            raise _refused(member.name, f"expected at most {manifests.MAX_SIZE} bytes, got {member.size}")


def _refused(name: str, reason: str) -> TrustError:
    return TrustError(CODE, f"cannot unpack {name[:80]!r} of the archive: {reason}")
