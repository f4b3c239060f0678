"""The Debian packages as files: the same bytes each time, only what is meant to be in them, nothing altered."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from instar.cli.unit_files import UNITS
from instar.core.errors import InputError
from instar_lab.deb import node_package, server_package
from instar_lab.deb.server import contents, locked
from instar_lab.deb.tree import PACKAGING
from instar_lab.program import build

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")


def paths(package: Path) -> list[tuple[str, str, str]]:
    """Mode, owner and path of everything in a package."""
    listed = subprocess.run(["dpkg-deb", "-c", package], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [(row[0], row[1], row[5].removeprefix(".")) for row in rows]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_node_package(tmp_path: Path) -> None:
    program = build.build("1.2.3")
    once = node_package(program, tmp_path / "a")
    old = os.umask(0o077)
    try:
        twice = node_package(program, tmp_path / "b")
    finally:
        os.umask(old)
    assert once.name == "instar_1.2.3_all.deb"
    assert sha256(once) == sha256(twice)

    found = paths(once)
    assert {owner for _, owner, _ in found} == {"root/root"}
    files = {path: mode for mode, _, path in found if not mode.startswith("d")}
    assert all(path.startswith("/usr/") for path in files)  # no /etc, so no conffiles; no /var
    assert files["/usr/bin/instar"] == "-rwxr-xr-x"
    assert {path.rpartition("/")[2] for path in files if "/systemd/system/" in path} == set(UNITS)
    inside = tmp_path / "inside"
    subprocess.run(["dpkg-deb", "-x", once, inside], check=True)
    assert (inside / "usr/lib/instar/instar.pyz").read_bytes() == program.data
    unit = (inside / "usr/lib/systemd/system/instar-agent.service").read_text()
    start = "/usr/bin/python3 -I -S -X no_debug_ranges /var/lib/instar/launcher/instar.pyz launch agent"
    assert f"\nExecStart={start} --state /var/lib/instar\n" in unit


@pytest.mark.slow
def test_server_package(tmp_path: Path) -> None:
    once, twice = (server_package("1.2.3", tmp_path / name) for name in ("a", "b"))
    assert sha256(once) == sha256(twice)
    files = [path for mode, _, path in paths(once) if not mode.startswith("d")]
    assert all(path.startswith("/usr/") for path in files)
    assert "/usr/lib/instar-server/instar_server/storage/migrations/script.py.mako" in files
    assert not [path for path in files if "__pycache__" in path or "/instar/agent/" in path]
    for name in ("aiohttp", "cryptography", "uvloop"):
        assert [path for path in files if path.startswith(f"/usr/lib/instar-server/{name}/")]


def test_what_was_altered_since_it_was_installed_is_not_packed(tmp_path: Path) -> None:
    assert dict(locked())["tuf"]
    real = importlib.metadata.distribution("typer")
    folder = Path(str(real.locate_file("typer")))
    notes = next(Path(str(real.locate_file(""))).glob("typer-*.dist-info"))
    shutil.copytree(folder, tmp_path / "typer")
    shutil.copytree(notes, tmp_path / notes.name)
    copy = importlib.metadata.PathDistribution(tmp_path / notes.name)
    assert dict(contents(copy))["typer/main.py"] == (folder / "main.py").read_bytes()
    (tmp_path / "typer/main.py").write_text("print('altered')\n")
    with pytest.raises(InputError, match="it is not what its wheel brought"):
        list(contents(copy))


@pytest.mark.parametrize(
    "script", sorted(PACKAGING.glob("*/p[or][se]*")), ids=lambda path: "/".join(path.parts[-2:])
)
def test_maintainer_scripts_are_sound_shell(script: Path) -> None:
    assert script.read_text().startswith("#!/bin/sh\n")
    assert "\nset -e\n" in script.read_text()
    subprocess.run(["sh", "-n", script], check=True)
