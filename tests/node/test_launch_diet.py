"""What stands between an ended agent and the next one's first line: the launcher's imports."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from instar.host.layout import Layout
from instar.host.line import Line
from instar_lab.program import build

# Modules that take a millisecond or more to import, or that the launcher must work without.
FORBIDDEN = (
    "argparse",
    "asyncio",
    "concurrent",
    "ctypes",
    "dataclasses",
    "datetime",
    "email",
    "http",
    "inspect",
    "instar.agent",
    "instar.engine",
    "instar.trust",
    "instar.wire",
    "logging",
    "random",
    "shutil",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "tempfile",
    "threading",
    "tokenize",
    "traceback",
    "typing",
    "urllib.request",
)
TELL = """
import json, os, sys
def start(argv):
    def tell(path, words):
        print(json.dumps({"become": words, "modules": sorted(sys.modules)}))
        sys.stdout.flush()
        os._exit(0)
    os.execv = tell
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A node with one release, and a launcher that says what it would become instead of becoming it."""
    layout, program = Layout(tmp_path / "state"), build.build("1.0.0", wrap=TELL)
    folder = layout.line("agent").releases / program.release
    layout.run.mkdir(parents=True)
    build.write(program, layout.launcher)
    build.write(program, folder / "instar.pyz")
    file = {
        "path": "instar.pyz",
        "size": len(program.data),
        "sha256": hashlib.sha256(program.data).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps({"files": [file]}))
    line = Line(layout.line("agent"))
    line.mark_valid(program.release)
    line.activate(program.release, "")
    return layout


def test_the_launcher_imports_little(layout: Layout) -> None:
    words = [str(layout.launcher), "launch", "agent", "--state", str(layout.state)]
    done = subprocess.run([sys.executable, "-I", "-S", *words], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    said = json.loads(done.stdout)
    assert said["become"][-3:] == ["agent", "--state", str(layout.state)]
    assert "instar.recovery.launch" in said["modules"]
    carried = [
        name for name in said["modules"] if f"{name}.".startswith(tuple(f"{bad}." for bad in FORBIDDEN))
    ]
    assert carried == []
