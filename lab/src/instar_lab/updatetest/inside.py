"""The update test in a container of its own, against the systemd in there: for tests and figures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from instar_lab.container import Container


def shown() -> tuple[Path, ...]:
    """What of this machine must be seen inside: the interpreter, its packages, and the sources."""
    wanted = {Path(sys.prefix), Path(sys.base_prefix), *(Path(each) for each in sys.path if each)}
    found = sorted(path for path in wanted if path.is_dir() and not path.is_relative_to("/usr"))
    return tuple(path for path in found if not any(path != up and path.is_relative_to(up) for up in found))


def words(*options: str) -> list[str]:
    """The tool's command line inside."""
    path = os.pathsep.join(filter(None, sys.path))
    python = ["env", f"PYTHONPATH={path}", "PYTHONDONTWRITEBYTECODE=1", sys.executable]
    return [*python, "-m", "instar_lab.main", "update-test", "--system", *options]


def run(container: Container, *options: str, within_s: float) -> subprocess.CompletedProcess[str]:
    """How it ended, well or not. Raises MachineError when it took too long."""
    return container.run(*words("--json", *options), within_s=within_s)
