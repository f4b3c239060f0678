"""`manifest.json` of a release: every file of it, with size, digest and mode (docs/protocol.md)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from instar.core.errors import InputError, TrustError
from instar.trust.fields import Fields
from instar.trust.paths import check_path

FORMAT = 1
NAME = "manifest.json"
MAX_SIZE = 1_048_576  # bytes of a manifest
MAX_FILES = 4_096
MODES = ("0644", "0755")
VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}")
CODE = "bad-manifest"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: `path` below the release, `size` in bytes, `mode` '0644' or '0755'."""

    path: str
    size: int
    sha256: str
    mode: str

    @property
    def mode_bits(self) -> int:
        return int(self.mode, 8)

    def check(self, size: int, sha256: str) -> None:
        """Raise TrustError `altered-file` unless the file found has this size and digest."""
        if size != self.size:
            raise TrustError(
                "altered-file", f"cannot trust {self.path}: expected {self.size} bytes, got {size}"
            )
        if sha256 != self.sha256:
            raise TrustError(
                "altered-file", f"cannot trust {self.path}: expected sha256 {self.sha256}, got {sha256}"
            )


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a release is and holds. `program_digest` is that of its `instar.pyz`, SHA-384."""

    name: str
    version: str
    program_digest: str
    files: tuple[FileEntry, ...]

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Read `manifest.json`. Raises InputError `bad-manifest` or `bad-path` naming what is wrong."""
        if len(data) > MAX_SIZE:
            raise InputError(CODE, f"cannot read the manifest: at most {MAX_SIZE} bytes, got {len(data)}")
        fields = Fields.decode(data, "the manifest", CODE)
        form = fields.get("format", int)
        if form != FORMAT:
            raise fields.error(f"expected 'format' to be {FORMAT}, got {form}")
        version = fields.get("version", str)
        if not VERSION.fullmatch(version):
            raise fields.error(f"expected 'version' of letters, digits and .+_-, got {version[:80]!r}")
        files = read_files(fields)
        return cls(fields.get("name", str), version, fields.hexadecimal("program_digest", 96), files)

    def encode(self) -> bytes:
        """The bytes of `manifest.json`; the same manifest gives the same bytes, files ordered by path."""
        value = {
            "format": FORMAT,
            "name": self.name,
            "version": self.version,
            "program_digest": self.program_digest,
            "files": write_files(self.files),
        }
        return (json.dumps(value, indent=1) + "\n").encode("ascii")

    def file(self, path: str) -> FileEntry | None:
        return next((file for file in self.files if file.path == path), None)

    def check_target(self, version: str, program_digest: str) -> None:
        """Raise TrustError `altered-manifest` unless this is what the signed target's `custom` promised."""
        for name, expected, got in (
            ("version", version, self.version),
            ("program_digest", program_digest, self.program_digest),
        ):
            if expected != got:
                raise TrustError(
                    "altered-manifest", f"cannot trust the manifest: expected {name} {expected}, got {got}"
                )


def read_files(fields: Fields) -> tuple[FileEntry, ...]:
    """The list 'files' of a manifest. Raises InputError `bad-manifest` or `bad-path`."""
    listed = fields.get("files", list)
    if not 0 < len(listed) <= MAX_FILES:
        raise fields.error(f"expected 1 to {MAX_FILES} files, got {len(listed)}")
    files = tuple(_entry(value, number) for number, value in enumerate(listed))
    _refuse_twice(files, fields)
    return files


def write_files(files: tuple[FileEntry, ...]) -> list[dict[str, object]]:
    """The same list for a manifest's JSON, ordered by path."""
    return [
        {"path": file.path, "size": file.size, "sha256": file.sha256, "mode": file.mode}
        for file in sorted(files, key=lambda file: file.path)
    ]


def _entry(value: object, number: int) -> FileEntry:
    fields = Fields(value, f"file {number} of the manifest", CODE)
    path = check_path(fields.get("path", str), "manifest")
    size = fields.get("size", int)
    if size < 0:
        raise fields.error(f"expected 'size' to be 0 or more, got {size}")
    mode = fields.get("mode", str)
    if mode not in MODES:
        raise fields.error(f"expected 'mode' to be one of {', '.join(MODES)}, got {mode[:20]!r}")
    return FileEntry(path, size, fields.hexadecimal("sha256", 64), mode)


def _refuse_twice(files: tuple[FileEntry, ...], fields: Fields) -> None:
    """No path twice, the manifest itself not listed, and no file where another one needs a folder."""
    paths = {file.path for file in files}
    if len(paths) != len(files):
        names = [file.path for file in files]
        raise fields.error(f"{next(name for name in names if names.count(name) > 1)!r} is listed twice")
    if NAME in paths:
        raise fields.error(f"{NAME} lists itself")
    for path in paths:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in paths:
                raise fields.error(f"{'/'.join(parts[:depth])!r} is a file and the folder of {path!r}")
