"""docs/releases.md, run just as it stands: a reader who copies its lines gets a fleet."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from instar_lab import machine
from instar_lab.program import build

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "releases.md"
COMMANDS = {"instarctl": "instar_server.ctl.main", "instar-server": "instar_server.main"}


def shell_blocks() -> str:
    blocks = re.findall(r"^```sh\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    return "\n".join(blocks)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """The server's commands, by this interpreter, wherever the packages come from."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, module in COMMANDS.items():
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        path.chmod(0o755)
    (folder / "python3").symlink_to(sys.executable)
    return folder


def test_the_documented_first_day(tmp_path: Path, commands: Path) -> None:
    program = build.build("1.0.0")
    (tmp_path / "built.pyz").write_bytes(program.data)
    work = tmp_path / "work"
    work.mkdir()
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "HOME": str(tmp_path),
        "INSTAR_PASSPHRASE": "for this test only",
        "KEYS": str(tmp_path / "keys"),
        "DATA": str(tmp_path / "data"),
        "WORK": str(work),
        "NODE": str(tmp_path / "n"),
        "PROGRAM": str(tmp_path / "built.pyz"),
        "HOST": "127.0.0.1",
        "GATEWAY": str(free_port()),
        "API": str(free_port()),
    }
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", shell_blocks()],
            env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    finally:
        machine.end_all_naming(tmp_path, grace_s=3.0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pid" in done.stdout, done.stdout
    assert "agent    1.0.0" in done.stdout, done.stdout
    assert re.search(r"signed\s+yes", done.stdout), done.stdout
