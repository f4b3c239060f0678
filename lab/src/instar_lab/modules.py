"""Build modules from their sources: compile what `[build]` of module.toml lists, then pack.

    python -m instar_lab.modules modules/disk.usage --out dist

`.so` is made by cc, `.wasm` by clang. `{machine}` in a name stands for this machine (uname -m); the manifest
then names the entries that were made here. The same source and the same compiler give the same bytes: no
debugging information, no build ids, no paths, no times.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from instar.core.errors import InputError, InstarError, MachineError
from instar_server.trust.module_source import Source, pack_module, read_source
from instar_server.trust.pack import Release

SDK = Path(__file__).resolve().parents[3] / "sdk"
COMPILE_S = 120.0
COMMON = ["-O2", "-g0", "-I", str(SDK)]
NATIVE = ["cc", "-shared", "-fPIC", "-Wl,--build-id=none"]
WASM = ["clang", "--target=wasm32", "-ffreestanding", "-nostdlib", "-Wl,--no-entry"]


def build(source: Path, out: Path) -> Release:
    """Compile and pack the module in `source`; `out` is made, and then holds its folder ready for packing.

    Raises InputError (module.toml, or a source that does not compile), MachineError `no-compiler`.
    """
    about = read_source(source)
    machine = os.uname().machine
    try:
        shutil.copytree(source, out, ignore=shutil.ignore_patterns("__pycache__", ".*"), symlinks=True)
    except OSError as error:
        raise MachineError("cannot-build", f"cannot build in {out}: {error}") from error
    for made, parts in about.build.items():
        _compile(about, out / made.replace("{machine}", machine), parts)
    return pack_module(out, [machine] if about.build else [])


def pack(source: Path) -> Release:
    """The release of the module in `source`, compiled first where that is needed."""
    with tempfile.TemporaryDirectory(prefix="instar-module-") as folder:
        return build(source, Path(folder) / "module")


def _compile(about: Source, made: Path, parts: list[str]) -> None:
    compiler = WASM if made.suffix == ".wasm" else NATIVE
    if shutil.which(compiler[0]) is None:
        raise MachineError("no-compiler", f"cannot build {made.name}: {compiler[0]} is not installed")
    sources = [part for part in parts if not part.startswith("-") and not part.endswith(".h")]
    flags = [part for part in parts if part.startswith("-")]
    made.parent.mkdir(parents=True, exist_ok=True)
    folder = about.folder.resolve()
    paths = [f"-ffile-prefix-map={folder}=.", f"-ffile-prefix-map={SDK}=sdk"]
    command = [*compiler, *COMMON, *paths, "-o", str(made.resolve()), *sources, *flags]
    environment = {**os.environ, "LC_ALL": "C", "SOURCE_DATE_EPOCH": "0"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_S, cwd=folder, env=environment, check=False
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError("no-compiler", f"cannot build {made.name}: {error}") from error
    if done.returncode:
        said = done.stderr.strip()[-4000:]
        raise InputError("does-not-compile", f"cannot build {made.name}: {compiler[0]}: {said}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="instar-lab modules", description="Compile and pack modules from their folders."
    )
    parser.add_argument("source", nargs="+", type=Path, metavar="FOLDER", help="folders with a module.toml")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the archives go")
    options = parser.parse_args(argv)
    try:
        for source in options.source:
            release = pack(source)
            options.out.mkdir(parents=True, exist_ok=True)
            path = options.out / Path(release.path).name
            path.write_bytes(release.archive)
            print(f"{path}: {len(release.archive):,} bytes, digest {release.digest}")
    except InstarError as error:
        print(f"instar-lab modules: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
