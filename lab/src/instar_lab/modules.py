"""Build modules from their sources: compile what `[build]` of module.toml lists, then pack.

    instar-lab modules modules/disk.usage --out dist

`.so` is made by cc, `.wasm` by clang. `{machine}` in a name stands for this machine (uname -m); the manifest
then names the entries that were made here. The same source and the same compiler give the same bytes: no
debugging information, no build ids, no paths, no times.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from instar.core.errors import InputError, MachineError
from instar_server.trust.module_source import Source, pack_module, read_source
from instar_server.trust.pack import Release

ROOT = Path(__file__).resolve().parents[3]
SDK, OURS = ROOT / "sdk", ROOT / "modules"
COMPILE_S = 120.0
COMMON = ["-O2", "-g0", "-I", str(SDK)]
NATIVE = ["cc", "-shared", "-fPIC", "-Wl,--build-id=none"]
WASM = ["clang", "--target=wasm32", "-ffreestanding", "-nostdlib", "-Wl,--no-entry"]
PACKAGES = {"cc": "gcc libc6-dev", "clang": "clang lld"}  # of Debian


def build(source: Path, out: Path) -> Release:
    """Compile and pack the module in `source`; `out` is made, and then holds its folder ready for packing.

    Raises InputError (module.toml, or a source that does not compile), MachineError `no-compiler`,
    `compiler-failed`.
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


def pack_all(sources: Sequence[Path], out: Path, say: Callable[[str], None]) -> dict[str, MachineError]:
    """Write the archive of each module to `out`. What was passed over, by folder name: its compiler is missing.

    Raises InputError, and MachineError for everything else that is wrong with this machine.
    """
    passed_over: dict[str, MachineError] = {}
    out.mkdir(parents=True, exist_ok=True)
    for source in sources:
        try:
            release = pack(source)
        except MachineError as error:
            if error.code != "no-compiler":
                raise
            passed_over[source.name] = error
            continue
        path = out / Path(release.path).name
        path.write_bytes(release.archive)
        say(f"{path}: {len(release.archive):,} bytes, digest {release.digest}")
    return passed_over


def _find(compiler: str, made: str) -> None:
    """Raises MachineError `no-compiler`, naming what to install."""
    missing = compiler if shutil.which(compiler) is None else ""
    if compiler == "clang" and not missing and shutil.which("wasm-ld") is None:
        asked = ["clang", "--print-prog-name=wasm-ld"]  # a path, when it lies beside clang
        done = subprocess.run(asked, capture_output=True, text=True, timeout=COMPILE_S, check=False)
        missing = "" if done.stdout.startswith("/") else "wasm-ld"
    if missing:
        text = (
            f"cannot build {made}: {missing} is not installed (Debian: apt-get install {PACKAGES[compiler]})"
        )
        raise MachineError("no-compiler", text)


def _compile(about: Source, made: Path, parts: list[str]) -> None:
    compiler = WASM if made.suffix == ".wasm" else NATIVE
    _find(compiler[0], made.name)
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
        raise MachineError("compiler-failed", f"cannot build {made.name}: {error}") from error
    if done.returncode:
        said = done.stderr.strip()[-4000:]
        raise InputError("does-not-compile", f"cannot build {made.name}: {compiler[0]}: {said}")
