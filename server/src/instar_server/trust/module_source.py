"""A module's source folder, and the release that is packed from it. Nothing is compiled here.

disk.usage/
  module.toml      the manifest without the list of files
  disk_usage.py    everything else in the folder is part of the module, except names that begin with a
                   dot, __pycache__, and the sources that `[build]` names

name = "disk.usage"            version = "1.0.0"        about = "one line for operators"
runs = "python"                python | native | wasm
mode = "oneshot"               oneshot | service
stateful = false               depends = []             (services only)
[entry]                        any = "disk_usage.py", or for native one file a machine (uname -m):
                               x86_64 = "x86_64/disk.so"
[timeouts] [limits] [touches]  as in instar.trust.module, each with its default
[build]                        what a build makes from what, by cc (.so) or clang (.wasm); flags begin with '-':
"{machine}/disk.so" = ["disk.c", "-lm"]
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from instar.core.errors import InputError
from instar.trust.archive import MAX_TOTAL
from instar.trust.manifest import FORMAT, MAX_FILES, NAME
from instar.trust.module import ANY, KIND, Limits, ModuleManifest, Timeouts, Touches
from instar.trust.paths import check_path
from instar_server.trust.pack import Release, pack_files

SOURCE = "module.toml"
MAX_SOURCE = 1 << 20  # bytes of module.toml
CODE = "bad-module"
TOP = ("name", "version", "about", "runs", "mode", "stateful", "depends", "entry", "timeouts", "limits",
       "touches", "build")  # fmt: skip
SECTIONS: dict[str, type] = {"timeouts": Timeouts, "limits": Limits, "touches": Touches}
MACHINES = {
    "i386": 3, "i686": 3, "ppc64": 21, "ppc64le": 21, "s390x": 22, "armv6l": 40, "armv7l": 40, "armv8l": 40,
    "x86_64": 62, "aarch64": 183, "riscv64": 243, "loongarch64": 258,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """What `module.toml` says. `build` maps what is made to what it is made from."""

    folder: Path
    fields: dict[str, Any]
    build: dict[str, list[str]]

    def is_for_the_build(self, path: str) -> bool:
        """Whether only a build needs this file."""
        named = {part for parts in self.build.values() for part in parts}
        return path in named or (bool(named) and path.endswith(".h"))


def read_source(folder: Path) -> Source:
    """Read `module.toml`. Raises InputError `no-file`, `bad-module` naming the key or the line."""
    path = folder / SOURCE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError("no-file", f"cannot read {path}: {error.strerror}") from error
    try:
        if len(data) > MAX_SOURCE:
            raise _bad(f"expected at most {MAX_SOURCE} bytes, got {len(data)}")
        fields = tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise _bad(str(error)) from error
    _refuse_unknown("", fields, TOP)
    for name, section in SECTIONS.items():
        table = fields.get(name, {})
        if not isinstance(table, dict):
            raise _bad(f"{name}: expected a table [{name}], got {table!r:.40}")
        _refuse_unknown(f"{name}.", table, section.__slots__)  # type: ignore[attr-defined]
    return Source(folder, fields, _build(fields.pop("build", {})))


def pack_module(folder: Path, machines: Collection[str] = ()) -> Release:
    """The release of the module in `folder`. `machines`: leave out what is for any but these (and `any`).

    Raises InputError `bad-module` (what is wrong, and in which key or file), `bad-path`, `bad-manifest`.
    """
    source = read_source(folder)
    files = _files(source)
    fields = dict(source.fields)
    if machines and isinstance(fields.get("entry"), dict):
        fields["entry"] = {key: file for key, file in fields["entry"].items() if key in (*machines, ANY)}
    manifest = _manifest(fields, files)
    _check_entries(manifest, {path: data for path, (data, _) in files.items()})
    return pack_files(manifest, {path: data for path, (data, _) in files.items()})


def _manifest(fields: dict[str, Any], files: Mapping[str, tuple[bytes, str]]) -> ModuleManifest:
    """The manifest, by way of the reader that nodes use: so the words of its errors are theirs."""
    listed = [
        {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "mode": mode}
        for path, (data, mode) in sorted(files.items())
    ]
    entry = fields.get("entry")
    for machine, path in entry.items() if isinstance(entry, dict) else ():
        if not isinstance(path, str) or path not in files:
            here = ", ".join(sorted(files)) or "nothing"
            raise _bad(f"entry.{machine}: expected a file of the folder, got {path!r} (there is: {here})")
    try:
        body = json.dumps({**fields, "format": FORMAT, "kind": KIND, "files": listed})
    except TypeError as error:  # TOML knows dates
        raise _bad(str(error)) from error
    try:
        return ModuleManifest.decode(body.encode())
    except InputError as error:
        raise InputError(error.code, f"cannot pack {SOURCE}: {error.text}") from error


def _files(source: Source) -> dict[str, tuple[bytes, str]]:
    """Every file of the module by its path: bytes and mode. Raises InputError for what is no plain file."""
    found: dict[str, tuple[bytes, str]] = {}
    total = 0
    for path in _walk(source.folder, ""):
        if path == SOURCE or source.is_for_the_build(path):
            continue
        check_path(path, "module's file")
        if path == NAME:
            raise _bad(f"{NAME}: this file is made by packing, and must not be there")
        file = source.folder / path
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "no regular file"
            raise _bad(f"{path}: expected a regular file, got {kind}")
        total += status.st_size
        if len(found) >= MAX_FILES or total > MAX_TOTAL:
            raise _bad(f"expected at most {MAX_FILES} files and {MAX_TOTAL} bytes, got more ({path})")
        found[path] = (file.read_bytes(), "0755" if status.st_mode & 0o111 else "0644")
    return found


def _walk(folder: Path, below: str) -> list[str]:
    """All paths below `folder` but those that are never packed; links to folders are paths, not folders."""
    paths: list[str] = []
    with os.scandir(folder / below) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name == "__pycache__":
                continue
            path = f"{below}{entry.name}"
            paths += _walk(folder, f"{path}/") if entry.is_dir(follow_symlinks=False) else [path]
    return paths


def _check_entries(manifest: ModuleManifest, files: Mapping[str, bytes]) -> None:
    """What is cheap to see here, and would else be seen on each node: the files are of the kind they should be."""
    for machine, path in manifest.entry.items():
        check = {"python": _check_python, "native": _check_native, "wasm": _check_wasm}[manifest.runs]
        check(machine, path, files[path])


def _check_python(machine: str, path: str, data: bytes) -> None:
    try:
        compile(data, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        where = f" line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise _bad(f"{path}{where}: {getattr(error, 'msg', error)}") from error


def _check_native(machine: str, path: str, data: bytes) -> None:
    if machine == ANY:
        raise _bad(f"entry.{ANY}: a native module names a file for each machine, such as x86_64 = {path!r}")
    if data[:4] != b"\x7fELF" or len(data) < 20:
        raise _bad(f"entry.{machine}: {path}: expected a shared library (ELF), got another kind of file")
    found = int.from_bytes(data[18:20], "little" if data[5] == 1 else "big")
    expected = MACHINES.get(machine)
    if expected is not None and found != expected:
        names = [name for name, number in MACHINES.items() if number == found] or [f"number {found}"]
        raise _bad(f"entry.{machine}: {path}: expected a library for {machine}, got one for {names[0]}")


def _check_wasm(machine: str, path: str, data: bytes) -> None:
    if data[:4] != b"\0asm":
        raise _bad(f"entry.{machine}: {path}: expected WebAssembly, got another kind of file")


def _build(table: Any) -> dict[str, list[str]]:
    if not isinstance(table, dict):
        raise _bad(f"build: expected a table [build], got {table!r:.40}")
    for made, parts in table.items():
        check_path(made, "built file's")
        if not isinstance(parts, list) or not all(isinstance(part, str) and part for part in parts):
            raise _bad(f"build.{made}: expected a list of sources and flags, got {parts!r:.40}")
        for part in parts:
            if not part.startswith("-"):
                check_path(part, "source")
    return dict(table)


def _refuse_unknown(where: str, table: Mapping[str, Any], known: Collection[str]) -> None:
    for key in table:
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            raise _bad(f"{where}{key}: there is no such key; {hint}")


def _bad(reason: str) -> InputError:
    return InputError(CODE, f"cannot pack {SOURCE}: {reason}")
