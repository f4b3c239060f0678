"""Salt beside us: installed by its package name into an environment of its own, run apart, asked for figures."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from bench.peers.apart import Apart, PeerUnavailable, last_line, usable

NAME = "salt"
VERSION = "3008.3"
INSTALL_S = 900.0
START_S = 180.0
MINIONS = 10
INSIDE = Path(__file__).with_name("salt_inside.py")


def install(cache: Path) -> Path:
    """The environment's interpreter; made, and Salt fetched by pip, unless it is there already."""
    cache = usable(cache, NAME)
    home = cache / f"{NAME}-{VERSION}"
    python, whole = home / "bin/python", home / "whole"
    if whole.exists():
        return python
    print(f"installing {NAME} {VERSION} into {home}", flush=True)
    try:
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run(
            [sys.executable, "-m", "venv", str(home)], check=True, capture_output=True, text=True, timeout=120
        )
        subprocess.run(
            [
                str(python),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                f"{NAME}=={VERSION}",
            ],
            cwd=cache,
            check=True,
            capture_output=True,
            text=True,
            timeout=INSTALL_S,
        )
        whole.touch()  # written last, so that an interrupted installation does not count
    except subprocess.CalledProcessError as error:
        raise PeerUnavailable("peer-install", f"cannot install {NAME}: {last_line(error.stderr)}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerUnavailable("peer-install", f"cannot install {NAME}: {error}") from error
    return python


class Salt(Apart):
    """A master with one minion on a loopback of its own; the words are those of `salt_inside`."""

    def __init__(self, cache: Path, minions: int = MINIONS) -> None:
        python = install(cache)
        super().__init__(NAME, START_S)
        # Isolated: this folder has a file of the package's name.
        self.begin([str(python), "-I", str(INSIDE), str(self.folder), str(minions)])
