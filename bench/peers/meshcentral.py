"""MeshCentral beside us: installed by its package name, run apart from everything, asked for figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.peers.apart import Apart, PeerUnavailable, usable

NAME = "meshcentral"
VERSION = "1.1.55"
INSTALL_S = 600.0
START_S = 240.0


def install(cache: Path) -> Path:
    """The package's folder below `cache`; fetched by the package manager unless it is there already."""
    cache = usable(cache, NAME)
    try:
        if not installed(cache):
            print(f"installing {NAME} {VERSION} into {cache}", flush=True)
            words = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=0"]
            subprocess.run(
                [*words, "--prefix", str(cache), f"{NAME}@{VERSION}"],
                cwd=cache,
                check=True,
                capture_output=True,
                text=True,
                timeout=INSTALL_S,
            )
    except subprocess.CalledProcessError as error:
        why = next((line for line in error.stderr.splitlines() if " error " in line), "no word about why")
        raise PeerUnavailable("peer-install", f"cannot install {NAME}: {why}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerUnavailable("peer-install", f"cannot install {NAME}: {error}") from error
    return cache / "node_modules" / NAME


def installed(cache: Path) -> bool:
    """By the list that npm writes last, so that an interrupted installation does not count."""
    try:
        listed = json.loads((cache / "node_modules/.package-lock.json").read_bytes())["packages"]
        return str(listed[f"node_modules/{NAME}"]["version"]) == VERSION
    except (OSError, ValueError, KeyError):
        return False


class MeshCentral(Apart):
    """A context manager around `peers.inside`. Raises PeerUnavailable."""

    def __init__(self, cache: Path) -> None:
        package = install(cache)
        super().__init__(NAME, START_S)
        self.begin([sys.executable, "-m", "bench.peers.inside", str(package), str(self.folder)])
