"""MeshCentral beside us: installed by its package name, run apart from everything, asked for figures."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path

from instar.core.errors import MachineError

NAME = "meshcentral"
VERSION = "1.1.55"
INSTALL_S = 600.0
START_S = 240.0
ANSWER_S = 150.0  # longer than the steps of one answer may take together
END_S = 10.0


class PeerUnavailable(MachineError):
    """The peer cannot be installed, does not run, or does not do what it is measured at."""


def default_cache() -> Path:
    return Path(tempfile.gettempdir()) / f"instar-peers-{os.geteuid()}"


def install(cache: Path) -> Path:
    """The package's folder below `cache`; fetched by the package manager unless it is there already."""
    cache = cache.absolute()
    if Path.cwd() in (cache, *cache.parents):
        raise PeerUnavailable("peer-inside", f"cannot install {NAME}: {cache} is part of the repository")
    package = cache / "node_modules" / NAME
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if cache.stat().st_uid != os.geteuid():
            raise PeerUnavailable("peer-cache", f"cannot install {NAME}: {cache} is somebody else's")
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
    return package


def installed(cache: Path) -> bool:
    """By the list that npm writes last, so that an interrupted installation does not count."""
    try:
        listed = json.loads((cache / "node_modules/.package-lock.json").read_bytes())["packages"]
        return str(listed[f"node_modules/{NAME}"]["version"]) == VERSION
    except (OSError, ValueError, KeyError):
        return False


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no word about why")


class MeshCentral:
    """A context manager around `peers.inside`: network, processes and mounts apart, nothing left at the end.

    Needs `unshare` and either root or user namespaces. Raises PeerUnavailable.
    """

    def __init__(self, cache: Path) -> None:
        package = install(cache)
        self._folder = tempfile.TemporaryDirectory(prefix="instar-peer-", ignore_cleanup_errors=True)
        self._log = Path(self._folder.name) / "log"
        apart = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        if os.geteuid() != 0:
            apart += ["--user", "--map-root-user"]
        inside = [sys.executable, "-m", "bench.peers.inside", str(package), self._folder.name]
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [*apart, *inside], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
                )
        except OSError as error:
            self._folder.cleanup()
            raise PeerUnavailable("peer-start", f"cannot run {NAME}: {error}") from error

    def __enter__(self) -> MeshCentral:
        try:
            self._answer(START_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it: the kernel ends every process of the namespace with its first one."""
        self._process.kill()
        self._process.wait(END_S)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._folder.cleanup()

    def ask(self, word: str, within_s: float = ANSWER_S) -> dict[str, float]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{word}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; the answer that is missing tells why
        return self._answer(within_s)

    def _answer(self, within_s: float) -> dict[str, float]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], within_s)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            why = (
                last_line(self._log.read_text(errors="replace")) if ready else f"no answer in {within_s:g} s"
            )
            raise PeerUnavailable("peer-failed", f"cannot measure {NAME}: {why}")
        answer: dict[str, float] = json.loads(line)
        return answer
