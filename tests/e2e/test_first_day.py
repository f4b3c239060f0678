"""docs/releases.md and docs/operating.md, run just as they stand: a reader who copies the lines gets a fleet."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from instar_lab import machine
from instar_lab.program import build, recovery

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "instarctl": "instar_server.ctl.main",
    "instar-server": "instar_server.main",
    "instar-lab": "instar_lab.main",
}
# What needs nothing of the rest and is read on its own, beside it.
UPDATE_TEST = "Test an update on this machine"


def sections(document: str) -> dict[str, str]:
    """The lines to type, by the heading that they stand under ('' for those before the first one)."""
    parts = re.split(r"^## (.*)\n", "## \n" + (ROOT / "docs" / document).read_text(), flags=re.MULTILINE)
    return {
        heading: "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
        for heading, text in zip(parts[1::2], parts[2::2], strict=True)
    }


class Reader:
    """Somebody who types the lines of documents, from the root of the repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.node = folder / "n"
        work = folder / "work"
        work.mkdir()
        self.environment = os.environ | {
            "PATH": f"{self._commands()}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "HOME": str(folder),
            "WORK": str(work),
        }

    def prepare(self) -> None:
        """What the documents' variables stand for: programs, places, ports."""
        folder = self.folder
        (folder / "built.pyz").write_bytes(build.build("1.0.0").data)
        (folder / "next.pyz").write_bytes(build.build("1.1.0").data)
        (folder / "newer.pyz").write_bytes(build.build("1.2.0").data)
        (folder / "instar-recovery.pyz").write_bytes(recovery.build_core("1.2.0").data)
        self.environment |= {
            "INSTAR_PASSPHRASE": "for this test only",
            "KEYS": str(folder / "keys"),
            "DATA": str(folder / "data"),
            "NODE": str(self.node),
            "PROGRAM": str(folder / "built.pyz"),
            "NEXT": str(folder / "next.pyz"),
            "NEWER": str(folder / "newer.pyz"),
            "CORE": str(folder / "instar-recovery.pyz"),
            "HOST": "127.0.0.1",
            "GATEWAY": str(machine.free_port()),
            "API": str(machine.free_port()),
            "PORT": str(machine.free_port()),
            "PUSH": str(machine.free_port()),
        }

    def _commands(self) -> Path:
        """The server's commands, by this interpreter, wherever the packages come from."""
        folder = self.folder / "bin"
        folder.mkdir()
        for name, module in COMMANDS.items():
            path = folder / name
            path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
            path.chmod(0o755)
        (folder / "python3").symlink_to(sys.executable)
        return folder

    def shorten_trials(self) -> None:
        """The node tries a new release for a second, from its next start on: waiting is not what a reader types."""
        config = self.node / "config.toml"
        text, count = re.subn(
            r"^# hold_s = 10\.0 .*$", "hold_s = 1.0", config.read_text(), flags=re.MULTILINE
        )
        assert count == 1, text
        config.write_text(text)

    def type(self, lines: str, timeout_s: float) -> str:
        """What they print; none may fail."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", lines],
            env=self.environment, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL,
            check=False, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@contextlib.contextmanager
def reading() -> Iterator[Reader]:
    folder = Path(tempfile.mkdtemp(prefix="iday-", dir="/tmp"))
    try:
        yield Reader(folder)
    finally:
        machine.end_all_naming(folder, grace_s=3.0)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    """One for both documents: the second one goes on where the first one ends."""
    with reading() as reader:
        reader.prepare()
        yield reader


@pytest.fixture(scope="module")
def first_day(reader: Reader) -> str:
    lines = "\n".join(sections("releases.md").values())
    return reader.type(lines, 400)


@pytest.mark.xdist_group("first-day")
def test_the_documented_first_day(first_day: str) -> None:
    assert "pid" in first_day, first_day
    assert "agent    1.0.0" in first_day, first_day
    assert re.search(r"signed\s+yes", first_day), first_day


@pytest.mark.xdist_group("first-day")
def test_the_documented_operation(first_day: str, reader: Reader) -> None:
    parts = sections("operating.md")
    del parts[UPDATE_TEST]
    reader.shorten_trials()
    said = reader.type("\n".join(parts.values()), 1200)
    assert re.search(r"interfaces\.list\s+.*1\.0\.0\s+.*python\s+.*oneshot", said), said
    assert said.count('"name": "lo"') >= 2, said
    assert re.search(r"1 cancelled", said), said
    assert re.search(r"1 queued", said), said
    assert re.search(r"file\.integrity +1\.0\.0 +ready", said), said
    assert said.count(" success\n") == 3, "instar restart three times: " + said
    assert said.count("knocked at 127.0.0.1") == 2, said
    assert re.search(r"updater runs 1\.1\.0 \(\w+\)\nagent runs 1\.1\.0 \(\w+\)\n", said), said
    assert re.search(r"held by a push: .*agent on 1\.1\.0", said), said
    assert re.search(r"agent runs 1\.0\.0", said), said
    assert re.search(r"held +agent 1\.1\.0, pushed at", said), said
    assert re.search(r"for the sake of wish.*state +│ received", said, re.DOTALL), said
    assert re.search(r"for the sake of operator.*state +│ done", said, re.DOTALL), said
    assert re.search(r"for the sake of beacon.*state +│ done", said, re.DOTALL), said
    assert re.search(r"agent +1\.2\.0-\w+ +pid", said), said
    log = (reader.node / "run" / "agent.log").read_text()
    assert re.search(r"restart of file\.integrity, asked by server:\S+, ended", log), log
    assert f"asked by local:{os.getuid()}" in log, log


def test_the_documented_update_test() -> None:
    with reading() as reader:
        said = reader.type(sections("operating.md")[UPDATE_TEST], 900)
    assert said.count("2 of 2 updates ended on the wanted hash") == 2, said
    assert said.count("uninstalled: nothing is left") == 2, said
