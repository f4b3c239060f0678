"""The recovery core's build: only what it needs, all that it needs, the same bytes everywhere."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from instar.core.errors import InputError
from instar_lab import main as lab
from instar_lab.program import build, recovery
from tests.tools.test_build import copy_sources, other_pythons

LARGEST = 2_200_000  # bytes; it comes through the channel: a sudden growth wants a look
NOT_NEEDED = (
    "instar/agent/", "instar/cli/", "instar/runner/", "instar/modules/", "instar/recovery/", "instar/wire/web",
    "instar/__main__", "instar/host/boot", "instar/host/cgroups", "tuf/repository",
)  # fmt: skip

# Each module by itself, in an interpreter that has nothing but the standard library.
IMPORT_ALL = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
from instar.oneshot import diet
diet.apply()
for name in sys.argv[2:]:
    importlib.import_module(name)
print(len(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def core() -> build.Program:
    return recovery.build_core("9.0.0")


@pytest.fixture(scope="module")
def core_file(core: build.Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("core") / "instar-recovery.pyz"
    build.write(core, path)
    return path


def names(core: build.Program) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(core.data)) as archive:
        return [name for name in archive.namelist() if name.endswith(".py")]


def run(python: str, path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-I", "-S", str(path), *words], capture_output=True, text=True, timeout=60, check=False
    )


def test_it_holds_only_what_it_needs(core: build.Program) -> None:
    assert not [name for name in names(core) if name.startswith(NOT_NEEDED)]
    assert len(core.data) < LARGEST
    assert len(core.data) < 0.6 * len(build.build("9.0.0").data)


def test_nothing_that_it_needs_is_missing(core: build.Program, core_file: Path) -> None:
    """Every module in it can be imported, and all that any function of it may import is in it."""
    with zipfile.ZipFile(core_file) as archive:
        sources = {name: archive.read(name) for name in names(core)}
    whole = build.package_sources("instar")
    for library in build.LIBRARIES:
        whole |= build.package_sources(library)
    for name, source in sources.items():
        parts = name.removesuffix(".py").split("/")
        package = ".".join(parts[:-1])
        for module in recovery.imported(ast.parse(source), package):
            file = recovery.file_of(module, whole)
            assert file is None or file in sources, f"{name} imports {module}"
    modules = [name.removesuffix(".py").replace("/", ".") for name in sources if name.startswith("instar/")]
    modules = [name.removesuffix(".__init__") for name in modules]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", IMPORT_ALL, str(core_file), *modules],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == (str(len(modules)), "")


def test_it_starts_isolated(core_file: Path) -> None:
    for python in (sys.executable, *other_pythons()):
        done = run(python, core_file, "--state", "/nonexistent", "--order", "/nonexistent")
        assert done.returncode == 2, done.stderr
        assert json.loads(done.stdout)["ended"]["code"] == "bad-order"
        child = run(python, core_file, "verify", "--state", "/nonexistent", "--target", "node/x")
        assert json.loads(child.stdout)["error"]["code"] == "no-server"


@pytest.mark.parametrize("words", [[], ["--state", "/x"], ["--order", "/x", "--state", "/y"], ["now"]])
def test_other_words_are_refused(core_file: Path, words: list[str]) -> None:
    done = run(sys.executable, core_file, *words)
    assert done.returncode == 2
    assert json.loads(done.stdout)["ended"]["code"] == "usage"


def test_same_source_same_bytes(core: build.Program, tmp_path: Path) -> None:
    folder = copy_sources(tmp_path / "a")
    out = folder / "out.pyz"
    code = f"import sys; from instar_lab.main import main; sys.exit(main({['build', '--recovery', '--version', '9.0.0', '--out', str(out)]!r}))"
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(str(folder / part / "src") for part in ("node", "server", "lab")),
        "PYTHONHASHSEED": "77",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env=env,
        cwd=folder,
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert out.read_bytes() == core.data
    assert f"version 9.0.0, {len(core.data):,} bytes, digest {core.digest}" in done.stdout


def test_what_it_cannot_build_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError):
        recovery.build_core("one")
    words = ["build", "--recovery", "--variant", "hangs", "--version", "1.0.0", "--out", str(tmp_path / "x")]
    assert lab.main(words) == 2
    assert "--recovery or --variant" in capsys.readouterr().err


def test_imports_are_followed() -> None:
    sources = {
        "a/__init__.py": b"from a.b import c\n",
        "a/b.py": b"from __future__ import annotations\nfrom typing import TYPE_CHECKING\nc = 1\n"
        b"if TYPE_CHECKING:\n    import a.types\nelse:\n    from . import late\n",
        "a/late.py": b"def f():\n    try:\n        from .sub.deep import g\n    except ImportError:\n        pass\n",
        "a/sub/__init__.py": b"",
        "a/sub/deep.py": b"import os, json\nclass C:\n    from ..other import x\n",
        "a/other.py": b"",
        "a/types.py": b"",
        "a/unused.py": b"import a",
    }
    assert recovery.reached(sources, ("a.b",)) == set(sources) - {"a/types.py", "a/unused.py"}
