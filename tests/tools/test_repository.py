"""The repository's own tooling: locks, Makefile, import rules, nothing of anyone's machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import ClassVar

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


def test_there_are_locks() -> None:
    assert [path.name for path in LOCKS] == ["dev.txt", "server.txt"]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_lock_holds_names_versions_and_hashes_only(path: Path) -> None:
    requirement = re.compile(r"[a-z0-9._-]+==[A-Za-z0-9.!+_-]+( ; [^\\/@]+)? \\")
    checksum = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert requirement.fullmatch(line) or checksum.fullmatch(line), f"line {number}: {line}"


def names(path: Path) -> dict[str, str]:
    found = re.findall(r"^([a-z0-9._-]+)==([^ ]+)", path.read_text(), re.MULTILINE)
    return dict(found)


def test_a_server_runs_with_what_was_tested() -> None:
    dev, server = (names(path) for path in LOCKS)
    assert server.items() <= dev.items()


@pytest.mark.parametrize("distribution", ["node", "server", "lab"])
def test_every_dependency_is_locked(distribution: str) -> None:
    project = tomllib.loads((ROOT / distribution / "pyproject.toml").read_text())
    locked = names(ROOT / "requirements" / ("dev.txt" if distribution == "lab" else "server.txt"))
    needed = project["project"]["dependencies"] + project["build-system"]["requires"]
    own = {"instar-node", "instar-server"}
    assert {re.split(r"[\[><=]", need)[0] for need in needed} - own <= locked.keys()


def test_the_node_needs_pure_python_only() -> None:
    project = tomllib.loads((ROOT / "node/pyproject.toml").read_text())
    assert {re.split(r"[><=]", need)[0] for need in project["project"]["dependencies"]} == {
        "securesystemslib", "tuf",
    }  # fmt: skip


def test_help_lists_every_target() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())  # type: ignore[index]
    defined = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    shown = subprocess.run(["make", "-s", "-C", ROOT], capture_output=True, text=True, check=True, timeout=30)
    assert set(re.findall(r"^  make ([a-z-]+) ", shown.stdout, re.MULTILINE)) == targets == defined


def test_ci_runs_what_the_readme_says() -> None:
    script = (ROOT / ".ci/run").read_text()
    assert re.search(r"^exec make test\b", script, re.MULTILINE)
    subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=True, timeout=30)
    subprocess.run(["bash", "-n", ROOT / "tools/setup.sh"], check=True, timeout=30)


class TestImportRules:
    """All contracts are kept, and each can fail."""

    BREAKS: ClassVar = {
        "layers": ("node/src/instar/core/probe.py", "import instar.host.files"),
        "pure": ("node/src/instar/core/probe.py", "import random"),
        "bytes": ("node/src/instar/wire/probe.py", "import subprocess"),
        "machine": ("node/src/instar/engine/probe.py", "import subprocess"),
        "daemons": ("node/src/instar/agent/probe.py", "import instar.updater"),
        "diet": ("node/src/instar/agent/probe.py", "import tuf.api.metadata"),
        "recovery": ("node/src/instar/recovery/probe.py", "import wsproto"),
        "server": ("server/src/instar_server/probe.py", "import instar.host.files"),
        "lab": ("node/src/instar/host/probe.py", "import instar_lab"),
    }

    def lint(self, root: Path) -> str:
        """lint-imports over the sources below `root`; its output without colours."""
        code = (
            "import sys; sys.path[:0] = sys.argv[1:]; sys.argv[1:] = ['--no-cache']\n"
            "from importlinter.cli import lint_imports_command; lint_imports_command()"
        )
        sources = [str(root / name) for name in ("node/src", "server/src", "lab/src")]
        done = subprocess.run(
            [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}", *sources],
            capture_output=True, text=True, cwd=root, timeout=120, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    def copy(self, folder: Path) -> Path:
        for name in ("node/src", "server/src", "lab/src"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        return folder

    def broken(self, output: str) -> set[str]:
        return set(re.findall(r"^(.*) BROKEN", output, re.MULTILINE))

    def test_all_are_kept(self) -> None:
        output = self.lint(ROOT)
        assert "0 broken" in output, output

    def test_each_can_fail(self, tmp_path: Path) -> None:
        contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
        title = {contract["id"]: contract["name"] for contract in contracts}
        assert title.keys() == self.BREAKS.keys()
        root = self.copy(tmp_path)
        for number, (place, statement) in enumerate(self.BREAKS.values()):
            path = root / place
            path.with_name(f"zz_probe_{number}.py").write_text(statement + "\n")
        assert self.broken(self.lint(root)) == set(title.values())
