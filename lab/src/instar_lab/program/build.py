"""Build `instar.pyz`: one file, the same bytes for the same source on every machine.

    python -m instar_lab.program.build --version 1.1.0 --out dist/instar.pyz

What the file holds, in the order of names: the package `instar` with the version asked for, those parts of
tuf and securesystemslib that a node uses, and their licences. Beside every `.py` stands its
`.pyc` for the minor version of Python that builds; any other one runs from the `.py`. Everything is stored,
not compressed: the bytes then hang on no version of zlib, and a delta between two releases stays small.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from instar.core.errors import InputError, InstarError
from instar_lab.program import canonical

INTERPRETER = b"#!/usr/bin/env python3\n"
LIBRARIES = ("securesystemslib", "tuf")

# What no entry point imports on a node: other transports, the repository side, tests.
LEFT_OUT = (
    "securesystemslib/_vendor/ed25519/science.py",
    "securesystemslib/_vendor/ed25519/test_ed25519.py",
    "securesystemslib/hash.py",
    "tuf/ngclient/_internal/proxy.py",
    "tuf/ngclient/requests_fetcher.py",
    "tuf/ngclient/urllib3_fetcher.py",
    "tuf/repository/",
)
RESCUE = "instar/rescue/"  # the recovery core's own, which is a program apart (instar_lab.program.recovery)

MAIN = """\
import sys

from instar.__main__ import main

sys.exit(main())
"""

WRAPPED_MAIN = """\
import sys

import instar_lab_wrapper

instar_lab_wrapper.start(sys.argv[1:])

from instar.__main__ import main

sys.exit(main())
"""

VERSION_FILE = '''\
"""The version of this build."""

BUILT = "{built}"
VERSION = "{version}"
'''


BUILT_HELP = (
    "when it was built, for it to tell, as 2026-11-21T16:00:00Z (default: SOURCE_DATE_EPOCH, else nothing)"
)


@dataclass(frozen=True, slots=True)
class Program:
    """A built program. `digest` is its program digest: SHA-384 without the two bytes of comment length."""

    version: str
    data: bytes
    digest: str

    @property
    def release(self) -> str:
        """The name of its release folder on a node."""
        return f"{self.version}-{self.digest[:12]}"


def build(version: str, *, wrap: str | None = None, built: str | None = None) -> Program:
    """Build the node program as `version`.

    `wrap` is the source of a module with `start(argv)`, called before anything of the program is imported:
    the lab's way to make a program that misbehaves. `built` is when, for the program to tell; None: as
    `stated_date` says. Raises InputError for a version or date that is none.
    """
    check_version(version)
    ours = package_sources("instar")
    sources = {name: source for name, source in ours.items() if not name.startswith(RESCUE)}
    sources["instar/version.py"] = version_file(version, built)
    for library in LIBRARIES:
        sources |= package_sources(library)
    sources["__main__.py"] = (MAIN if wrap is None else WRAPPED_MAIN).encode()
    if wrap is not None:
        sources["instar_lab_wrapper.py"] = wrap.encode()
    files = dict(sources)
    for name, source in sources.items():
        files[f"{name}c"] = compiled(source, name)
    for library in LIBRARIES:
        files |= licences(library)
    data = pack(files)
    return Program(version, data, hashlib.sha384(data[:-2]).hexdigest())


def check_version(version: str) -> None:
    parts = version.split(".")
    if len(parts) != 3 or not all(part.isdecimal() and part.isascii() for part in parts):
        raise InputError("bad-version", f"cannot build: expected a version like 1.2.3, got {version!r}")


def version_file(version: str, built: str | None) -> bytes:
    date = stated_date() if built is None else check_date(built)
    return VERSION_FILE.format(version=version, built=date).encode()


def stated_date() -> str:
    """The date in SOURCE_DATE_EPOCH (reproducible-builds.org), else ''. Raises InputError `bad-date`.

    Without it no date is told: the same source gives the same bytes, whenever it is built.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not epoch:
        return ""
    try:
        return date_text(datetime.datetime.fromtimestamp(int(epoch), datetime.UTC))
    except (ValueError, OverflowError, OSError):
        text = f"cannot build: expected SOURCE_DATE_EPOCH in seconds since 1970, got {epoch!r}"
        raise InputError("bad-date", text) from None


def date_text(moment: datetime.datetime) -> str:
    """`moment`, which has a time zone, as a program tells it: 2026-11-21T16:00:00Z."""
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def check_date(text: str) -> str:
    """'' stays ''; a date of another time zone is told in UTC. Raises InputError `bad-date`."""
    if not text:
        return ""
    try:
        moment = datetime.datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError(text)
        return date_text(moment)
    except (ValueError, OverflowError):
        example = "2026-11-21T16:00:00Z"
        text = f"cannot build: expected a date and time zone like {example}, got {text!r}"
        raise InputError("bad-date", text) from None


def package_sources(package: str) -> dict[str, bytes]:
    """Every `.py` of an installed package that a node needs, by its name in the program."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError("package-missing", f"cannot build: package {package} is not installed")
    root = Path(spec.submodule_search_locations[0])
    found: dict[str, bytes] = {}
    for path in root.rglob("*.py"):
        name = (PurePosixPath(package) / path.relative_to(root).as_posix()).as_posix()
        if not name.startswith(LEFT_OUT):
            # Some folders are packages without an __init__.py, which cannot be imported from a zip file.
            found.setdefault(f"{PurePosixPath(name).parent}/__init__.py", b"")
            found[name] = path.read_bytes()
    return found


def compiled(source: bytes, name: str) -> bytes:
    """The `.pyc` for one file. Raises InputError when this Python cannot read the source."""
    try:
        return canonical.pyc(source, name)
    except SyntaxError as error:
        text = f"cannot build: {name} line {error.lineno}: {error.msg}"
        raise InputError("bad-source", text) from error


def licences(library: str) -> dict[str, bytes]:
    """The licence texts that travel with a library's code."""
    distribution = importlib.metadata.distribution(library)
    found: dict[str, bytes] = {}
    for file in distribution.files or []:
        if file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "COPYING")):
            found[f"licences/{library}/{file.name}"] = Path(str(file.locate())).read_bytes()
    return found


def pack(files: Mapping[str, bytes]) -> bytes:
    """The zip file behind its interpreter line; nothing in it but names and bytes."""
    stream = io.BytesIO()
    stream.write(INTERPRETER)
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, wherever it is built
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, files[name])
    return stream.getvalue()


def write(program: Program, path: Path) -> None:
    """Write the program as an executable file, replacing what was there in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(program.data)
    temporary.chmod(0o755)
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="instar-lab build", description="Build the node program instar.pyz."
    )
    parser.add_argument("--version", required=True, metavar="1.2.3", help="the version that the program says")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="where to write the program")
    parser.add_argument("--built", metavar="DATE", help=BUILT_HELP)
    options = parser.parse_args(argv)
    try:
        program = build(options.version, built=options.built)
        write(program, options.out)
    except InstarError as error:
        print(f"instar-lab build: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{options.out}: version {program.version}, {len(program.data):,} bytes, digest {program.digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
