"""The programs that an update test goes from and to: given files, this tree, and any of them with another number."""

from __future__ import annotations

import ast
import datetime
import hashlib
import io
import lzma
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from instar.core.errors import InputError
from instar.trust.program import split_program
from instar_lab.program import build, canonical

ENTRY, VERSION_FILE = "instar/__main__.py", "instar/version.py"
SETTINGS_FILE = "instar/core/settings.py"
LARGEST = 256 * 1024 * 1024  # bytes of a program file that is read at all
# What a file that is no program, or a damaged one, makes of being read; compressed and encrypted zip files, too.
UNREADABLE = (
    InputError, ValueError, KeyError, SyntaxError, EOFError, OSError, RuntimeError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip
WORD = re.compile(rb"^(VERSION|BUILT)\s*=\s*(\"[^\"\n]*\"|'[^'\n]*')", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Build:
    """`built` is when, as the program tells it; '' when it does not. `source`: where it comes from, for people."""

    program: build.Program
    built: str
    source: str

    @property
    def version(self) -> str:
        return self.program.version

    @property
    def digest(self) -> str:
        return self.program.digest

    @property
    def short(self) -> str:
        """The digest's first digits, as they are shown."""
        return self.digest[:12]


def from_tree(version: str = "") -> Build:
    """Build this source tree now. '' for the version that it says."""
    now = build.stated_date() or build.date_text(datetime.datetime.now(datetime.UTC))
    stated = version or _words(build.package_sources("instar")[VERSION_FILE])["VERSION"]
    return Build(build.build(stated, built=now), now, "this tree")


def read(path: Path) -> Build:
    """A built program; the configuration that it may carry is left out.

    Raises InputError `no-file`, `not-a-program`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise InputError("no-file", f"cannot read {path}: {error.strerror}") from error
    try:
        if len(data) > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        return _read(data, path.name)
    except UNREADABLE as error:
        text = f"cannot use {path}: it is no program of Instar as 'instar-lab build' makes it: {error}"
        raise InputError("not-a-program", text) from None


def _read(data: bytes, source: str) -> Build:
    bare, _ = split_program(data)
    with zipfile.ZipFile(io.BytesIO(bare)) as archive:
        archive.getinfo("__main__.py"), archive.getinfo(ENTRY)
        if damaged := archive.testzip():  # `numbered` reads all of it
            raise ValueError(f"{damaged} is damaged")
        words = _words(archive.read(VERSION_FILE))
    build.check_version(words["VERSION"])
    program = build.Program(words["VERSION"], bare, hashlib.sha384(bare[:-2]).hexdigest())
    return Build(program, words.get("BUILT", ""), source)


def _words(source: bytes) -> dict[str, str]:
    """What a version file says. Raises ValueError without a VERSION."""
    words = {match[1].decode(): str(ast.literal_eval(match[2].decode())) for match in WORD.finditer(source)}
    if "VERSION" not in words:
        raise ValueError(f"{VERSION_FILE} states no VERSION")
    return words


def knows(made: Build, key: str) -> bool:
    """Whether its config.toml may hold `key`. A build that finds an unknown one goes by its defaults alone."""
    with zipfile.ZipFile(io.BytesIO(made.program.data)) as archive:
        source = archive.read(SETTINGS_FILE) if SETTINGS_FILE in archive.namelist() else b""
    return re.search(rb"^    %s: " % re.escape(key.encode()), source, re.MULTILINE) is not None


def numbered(first: Build, steps: int) -> Build:
    """The same program with a version that is `steps` higher in its last part: other bytes, the same code."""
    major, minor, patch = map(int, first.version.split("."))
    version = f"{major}.{minor}.{patch + steps}"
    with zipfile.ZipFile(io.BytesIO(first.program.data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    source = files[VERSION_FILE].replace(f'"{first.version}"'.encode(), f'"{version}"'.encode())
    files[VERSION_FILE] = source
    files[f"{VERSION_FILE}c"] = canonical.pyc(source, VERSION_FILE)
    data = build.pack(files)
    program = build.Program(version, data, hashlib.sha384(data[:-2]).hexdigest())
    return Build(program, first.built, f"{first.source}, as {version}")
