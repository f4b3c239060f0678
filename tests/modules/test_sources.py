"""What holds for each module of this repository before it runs: it packs, it is honest and tight, it compiles cleanly."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from instar.trust.module import Limits
from instar_lab import modules
from tests.modules.conftest import MODULES, NAMES, compile_parts, manifest

SIX = ["disk.usage", "file.integrity", "interfaces.list", "inventory", "packages.list", "service.status"]
MOST_SOURCE = 450  # lines of one file


def test_they_are_six_in_three_kinds_and_both_modes() -> None:
    assert NAMES == SIX
    assert {manifest(name)["runs"] for name in NAMES} == {"python", "native", "wasm"}
    assert {manifest(name)["mode"] for name in NAMES} == {"oneshot", "service"}


@pytest.mark.parametrize("name", SIX)
def test_it_packs_the_same_way_twice(name: str, built: Callable[[str], Path]) -> None:
    built(name)  # passes over what cannot be compiled here
    first, second = modules.pack(MODULES / name), modules.pack(MODULES / name)
    assert first.archive == second.archive
    assert first.custom["name"] == name
    assert len(first.archive) < 65_536


@pytest.mark.parametrize("name", SIX)
def test_its_manifest_is_honest_and_tight(name: str) -> None:
    about = manifest(name)
    assert set(about["limits"]) >= {"memory", "processes", "files", "disk", "output"}
    assert about["limits"]["memory"] <= Limits().memory
    assert about["limits"]["files"] < Limits().files
    assert about["limits"]["disk"] < Limits().disk
    assert about["timeouts"]["run_s"] <= 30
    assert about["touches"]["read"]
    assert not about["touches"].get("write")  # none changes anything but its own data
    assert not about["touches"].get("network")  # none speaks to anybody
    assert about["about"].count(".") >= 1
    assert about.get("stateful", False) == (about["mode"] == "service")


@pytest.mark.parametrize("name", SIX)
def test_its_files_are_small(name: str) -> None:
    for file in (path for path in (MODULES / name).iterdir() if path.is_file()):
        assert len(file.read_text().splitlines()) <= MOST_SOURCE, file


@pytest.mark.parametrize("name", [name for name in SIX if "build" in manifest(name)])
def test_it_compiles_without_a_warning(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(MODULES / name, folder)
    for made, parts in manifest(name)["build"].items():
        compile_parts(folder, made, parts)


def test_the_native_one_needs_no_library_by_name(built: Callable[[str], Path]) -> None:
    """So that it is loaded into any process: one with glibc, or with musl."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not on this machine")
    [file] = built("disk.usage").glob("*/disk.so")
    words = ["readelf", "--dynamic", "--version-info", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)
    assert "NEEDED" not in done.stdout
    assert "GLIBC" not in done.stdout


@pytest.mark.parametrize("name", [name for name in SIX if manifest(name)["runs"] == "python"])
def test_python_needs_the_standard_library_alone(name: str) -> None:
    own = {path.stem for path in (MODULES / name).glob("*.py")}
    code = (
        "import ast, pathlib, sys\n"
        "for path in pathlib.Path(sys.argv[1]).glob('*.py'):\n"
        "    for node in ast.walk(ast.parse(path.read_text())):\n"
        "        names = [a.name for a in node.names] if isinstance(node, ast.Import) else "
        "[node.module] if isinstance(node, ast.ImportFrom) else []\n"
        "        print(*(name.split('.')[0] for name in names), sep='\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(MODULES / name)],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert set(done.stdout.split()) - own <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", [name for name in SIX if manifest(name)["runs"] == "python"])
def test_types(name: str, tmp_path: Path) -> None:
    """As strictly as what is shipped."""
    files = sorted(str(path) for path in (MODULES / name).glob("*.py"))
    words = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-error-summary",
        "--config-file=",
        f"--cache-dir={tmp_path}",
        *files,
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, cwd=MODULES / name)
    assert done.returncode == 0, done.stdout
