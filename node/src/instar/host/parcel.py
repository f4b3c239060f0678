"""A parcel: all that a node needs to install one target without reaching the artifacts (docs/protocol.md).

An uncompressed tar (USTAR) of plain files, in this order:

    parcel.json                     what it says of itself; nothing of it is believed
    metadata/<N>.root.json …        TUF metadata, verified as if they had been fetched
    metadata/timestamp.json  metadata/<N>.snapshot.json  metadata/<N>.targets.json
    archive                         the target's bytes, exactly as many as parcel.json says

Read by hand, one header of 512 bytes after the other: no long names, links, devices or extensions can get
through a reader that does not know them, and memory stays the same however large the archive is.

Import diet: bare standard library; the launcher's beacon reads parcels through this.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from instar.core.errors import InputError, TrustError
from instar.core.releases import Release
from instar.host.files import DISK, Disk, failed, make_folder, remove_tree

RECORD, METADATA, ARCHIVE = "parcel.json", "metadata", "archive"
FORMAT = 1
KINDS = ("node", "recovery")
BLOCK = 512  # bytes of a tar header, and what files are filled up to
CHUNK = 1 << 18  # bytes that are held at a time
MOST_PADDING = 1 << 16  # bytes of zeros after the last file

NAME = re.compile(
    r"metadata/(?:timestamp|(?P<n>[1-9][0-9]{0,8})\.(?P<role>root|snapshot|targets))\.json", re.ASCII
)
TARGET = re.compile(r"(?:node|recovery)/[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
OCTAL = re.compile(rb"[0-7]+[ \0]*")


class Stream(Protocol):
    """Gives at most so many bytes, and b'' at its end. What it raises is passed on."""

    def read(self, most: int, /) -> bytes: ...


class Limits(NamedTuple):
    """Bytes, and a number of files."""

    record: int = 16 << 10  # parcel.json
    metadata: int = 4 << 20  # each file of them
    all_metadata: int = 64 << 20  # together
    files: int = 200
    archive: int = 512 << 20

    @property
    def whole(self) -> int:
        """Bytes of the largest parcel: with a header and padding for each file."""
        return self.archive + self.all_metadata + self.files * 2 * BLOCK + MOST_PADDING


LIMITS = Limits()


class Parcel(NamedTuple):
    """One that is unpacked in `folder`. `digest` is the program's; `length` and `sha256` are the archive's."""

    folder: Path
    kind: str  # node | recovery
    version: str
    digest: str
    target: str
    length: int
    sha256: str

    @property
    def metadata(self) -> Path:
        return self.folder / METADATA

    @property
    def archive(self) -> Path:
        return self.folder / ARCHIVE


def unpack_parcel(stream: Stream, folder: Path, limits: Limits = LIMITS, disk: Disk = DISK) -> Parcel:
    """Read `stream` to its end, and make `folder` (what is there is removed first) of what it holds.

    Everything is on the disk when this returns. It is not marked as complete: that is for whoever knows
    what the SHA-384 of the whole must be. Raises TrustError (`bad-parcel`, `cut-parcel`) or MachineError
    (`disk-full`, `disk-failed`), and whatever the stream raises; then nothing is left.
    """
    remove_tree(folder, disk)
    try:
        make_folder(folder / METADATA, 0o700, disk)
        parcel = _Unpacking(stream, folder, limits, disk).run()
        disk.sync_folder(folder / METADATA)
        disk.sync_folder(folder)
    except OSError as error:
        _drop(folder, disk)
        raise failed("unpack", folder, error) from error
    except BaseException:
        _drop(folder, disk)
        raise
    return parcel


def read_record(data: bytes, folder: Path, limits: Limits = LIMITS) -> Parcel:
    """What parcel.json says. Raises TrustError `bad-parcel`."""
    try:
        body = json.loads(data)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f"expected an object of format {FORMAT}")
        kind, target = str(body["kind"]), str(body["target"])
        release = Release(str(body["version"]), str(body["digest"]))
        length, sha256 = body["length"], str(body["sha256"])
        if kind not in KINDS:
            raise ValueError(f"expected kind {' or '.join(KINDS)}, got {kind[:40]!a}")
        if not TARGET.fullmatch(target) or ".." in target or not target.startswith(f"{kind}/"):
            raise ValueError(f"expected a target below {kind}/, got {target[:80]!a}")
        if not isinstance(length, int) or isinstance(length, bool) or not 0 < length <= limits.archive:
            raise ValueError(f"expected a length of 1 to {limits.archive} bytes, got {length!a:.40}")
        if not SHA256.fullmatch(sha256):
            raise ValueError(f"expected sha256 as 64 hexadecimal digits, got {sha256[:80]!a}")
    except (ValueError, KeyError, TypeError, RecursionError, InputError) as error:
        raise _bad(f"{RECORD}: {_words(error)}") from None
    return Parcel(folder, kind, release.version, release.digest, target, length, sha256)


class _Member(NamedTuple):
    name: str
    size: int


def _check_size(member: _Member, most: int) -> None:
    if not 0 < member.size <= most:
        raise _bad(f"{member.name}: expected 1 to {most} bytes, got {member.size}")


class _Unpacking:
    def __init__(self, stream: Stream, folder: Path, limits: Limits, disk: Disk) -> None:
        self._stream, self._folder, self._limits, self._disk = stream, folder, limits, disk
        self._seen: set[str] = set()
        self._roles: set[str] = set()
        self._left = limits.all_metadata

    def run(self) -> Parcel:
        first = self._next()
        if first is None or first.name != RECORD:
            raise _bad(f"expected {RECORD} first, got {first.name!r}" if first else "it is empty")
        _check_size(first, self._limits.record)
        data = self._exactly(first.size)
        self._skip_padding(first.size)
        parcel = read_record(data, self._folder, self._limits)
        self._disk.write_new(self._folder / RECORD, data, 0o600)
        while (member := self._next()) is not None and member.name != ARCHIVE:
            self._metadata(member)
        if member is None:
            raise _bad(f"expected {ARCHIVE} last, got the end")
        missing = {"root", "timestamp", "snapshot", "targets"} - self._roles
        if missing:
            raise _bad(f"expected metadata of four roles, got none of {', '.join(sorted(missing))}")
        if member.size != parcel.length:
            raise _bad(f"expected an archive of {parcel.length} bytes, as {RECORD} says, got {member.size}")
        self._archive(member, parcel)
        self._finish()
        return parcel

    def _next(self) -> _Member | None:
        """The next header; None at the end of the files."""
        header = self._exactly(BLOCK)
        if not any(header):
            return None
        if len(self._seen) >= self._limits.files:
            raise _bad(f"expected at most {self._limits.files} files, got more")
        member = _read_header(header)
        if member.name in self._seen:
            raise _bad(f"{member.name} stands there twice")
        self._seen.add(member.name)
        return member

    def _metadata(self, member: _Member) -> None:
        match = NAME.fullmatch(member.name)
        if not match:
            raise _bad(f"expected metadata, then {ARCHIVE}, got {member.name[:80]!a}")
        role = match["role"] or "timestamp"
        if role in self._roles and role != "root":
            raise _bad(f"expected metadata of the role {role} once, got it twice")
        self._roles.add(role)
        _check_size(member, min(self._limits.metadata, self._left))
        self._left -= member.size
        self._write(member)

    def _archive(self, member: _Member, parcel: Parcel) -> None:
        """Whether it is what was signed is found out by those who use it. One that does not even fit its
        own words is refused here."""
        digest = hashlib.sha256()
        self._write(member, digest.update)
        if digest.hexdigest() != parcel.sha256:
            raise _bad(f"its archive has the SHA-256 {digest.hexdigest()}, expected {parcel.sha256}")

    def _write(self, member: _Member, tell: Callable[[bytes], None] = lambda _: None) -> None:
        """The member's bytes to its place, chunk by chunk."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        left = member.size
        with open(os.open(self._folder / member.name, flags, 0o600), "wb", buffering=0) as file:
            while left:
                chunk = self._some(min(CHUNK, left))
                tell(chunk)
                left -= len(chunk)
                view = memoryview(chunk)
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
        self._skip_padding(member.size)

    def _finish(self) -> None:
        """The second empty header, then zeros to the end: a tar is filled up to a multiple of 10 KiB."""
        if any(self._exactly(2 * BLOCK)):
            raise _bad(f"expected its end after {ARCHIVE}, got more")
        rest = 0
        while chunk := self._stream.read(CHUNK):
            rest += len(chunk)
            if any(chunk) or rest > MOST_PADDING:
                raise _bad("expected nothing after its end, got more")

    def _skip_padding(self, size: int) -> None:
        if any(self._exactly(-size % BLOCK)):
            raise _bad("expected zeros between its files, got other bytes")

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            data += self._some(min(CHUNK, size - len(data)))
        return bytes(data)

    def _some(self, most: int) -> bytes:
        chunk = self._stream.read(most)
        if not chunk:
            raise TrustError("cut-parcel", "cannot unpack the parcel: it ends early")
        return chunk


def _read_header(header: bytes) -> _Member:
    """The fields of POSIX.1-1988 that may differ; the others must say 'a plain file'."""
    if header[257:265] != b"ustar\x0000":
        raise _bad("expected a USTAR header, got another")
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if _number(header[148:156]) != total:
        raise _bad("the checksum of a header does not fit")
    name = header[:100].rstrip(b"\0")
    if header[156:157] != b"0":
        raise _bad(f"{name[:80]!a}: expected a regular file, got the type {header[156:157]!a}")
    if any(header[157:257]) or any(header[345:500]):
        raise _bad(f"{name[:80]!a}: expected no link and no long name, got one")
    text = name.decode("ascii", "replace")
    if text not in (RECORD, ARCHIVE) and not NAME.fullmatch(text):
        raise _bad(f"expected {RECORD}, metadata and {ARCHIVE} alone, got {text[:80]!a}")
    return _Member(text, _number(header[124:136]))


def _number(field: bytes) -> int:
    match = OCTAL.fullmatch(field)
    if not match:
        raise _bad(f"expected an octal number in a header, got {field!a}")
    return int(field.rstrip(b" \0"), 8)


def _drop(folder: Path, disk: Disk) -> None:
    with contextlib.suppress(OSError):
        disk.remove_tree(folder)


def _words(error: Exception) -> str:
    if isinstance(error, InputError):
        return error.text
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _bad(why: str) -> TrustError:
    return TrustError("bad-parcel", f"cannot unpack the parcel: {why}")
