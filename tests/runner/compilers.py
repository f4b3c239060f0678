"""Compiles the tests' modules: `native(source)` a shared library, `wasm(source)` a WebAssembly file, as bytes.

A test whose compiler is missing is passed over with the reason, unless INSTAR_COMPILERS_REQUIRED is set: then it
fails (.ci/run sets it where it has installed them).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SDK = ROOT / "sdk"
EXAMPLES = ROOT / "docs" / "examples" / "modules"
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O2", "-I", str(SDK)]
SHARED = ["-shared", "-fPIC"]
TO_WASM = ["--target=wasm32", "-ffreestanding", "-nostdlib", "-Wl,--no-entry"]
HEADER = '#include "instar_module.h"\n'


def need(*programs: str, package: str = "", required: bool = True) -> None:
    """Pass the test over, or fail it, unless all of them are here."""
    missing = [name for name in programs if shutil.which(name) is None]
    if package and find_spec(package) is None:
        missing.append(f"Python package {package}")
    if missing:
        text = f"not on this machine: {', '.join(missing)}"
        if required and os.environ.get("INSTAR_COMPILERS_REQUIRED"):
            pytest.fail(f"INSTAR_COMPILERS_REQUIRED is set, and {text}")
        pytest.skip(text)


def native(source: str, *flags: str, header: bool = True) -> bytes:
    """A shared library of C99 source; the header is included unless told otherwise."""
    need("cc")
    return compiled(["cc", *STRICT, *SHARED], ".c", HEADER * header + source, flags)


def wasm(source: str, *flags: str, header: bool = True) -> bytes:
    need_wasm()
    return compiled(["clang", *TO_WASM, *STRICT], ".c", HEADER * header + source, flags)


def need_wasm() -> None:
    need("clang", "wasm-ld", package="wasmtime")


def compiled(command: list[str], suffix: str, source: str, flags: tuple[str, ...] = ()) -> bytes:
    """What the compiler made of it; fails the test with the compiler's words when it made nothing."""
    with tempfile.TemporaryDirectory(prefix="instar-compile-") as name:
        file, out = Path(name, f"module{suffix}"), Path(name, "out")
        file.write_text(source)
        done = subprocess.run(
            [*command, "-o", out, file, *flags], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return out.read_bytes()


def example(name: str) -> tuple[dict[str, object], dict[str, bytes | str]]:
    """An example of docs/writing-modules.md: its module.toml and its files, built as [build] says."""
    folder = EXAMPLES / name
    about = tomllib.loads((folder / "module.toml").read_text())
    build: dict[str, list[str]] = about.pop("build", {})
    sources = {part for parts in build.values() for part in parts}
    files: dict[str, bytes | str] = {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.is_file() and file.name != "module.toml" and file.name not in sources
    }
    for made, parts in build.items():
        source = "".join((folder / part).read_text() for part in parts if not part.startswith("-"))
        make = wasm if made.endswith(".wasm") else native
        flags = [part for part in parts if part.startswith("-")]
        files[made.format(machine=os.uname().machine)] = make(source, *flags, header=False)
    return about, files
