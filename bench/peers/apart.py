"""A peer run apart from all: a network with nothing but loopback, own processes and mounts, asked by words."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
from pathlib import Path
from typing import TypeVar

from instar.core.errors import MachineError

ANSWER_S = 150.0  # longer than the steps of one answer may take together
END_S = 10.0
P = TypeVar("P", bound="Apart")


class PeerUnavailable(MachineError):
    """The peer cannot be installed, does not run, or does not do what it is measured at."""


def default_cache() -> Path:
    return Path(tempfile.gettempdir()) / f"instar-peers-{os.geteuid()}"


def usable(cache: Path, name: str) -> Path:
    """The cache's absolute path; it is there, ours, and no part of the repository. Raises PeerUnavailable."""
    cache = cache.absolute()
    if Path.cwd() in (cache, *cache.parents):
        raise PeerUnavailable("peer-inside", f"cannot install {name}: {cache} is part of the repository")
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if cache.stat().st_uid != os.geteuid():
            raise PeerUnavailable("peer-cache", f"cannot install {name}: {cache} is somebody else's")
    except OSError as error:
        raise PeerUnavailable("peer-install", f"cannot install {name}: {error}") from error
    return cache


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no word about why")


class Apart:
    """A context manager around a program that answers words with JSON objects, one a line each way.

    The first answer, an empty one, comes unasked when it is ready. Needs `unshare` and either root or user
    namespaces. Raises PeerUnavailable. Nothing is left at the end.
    """

    def __init__(self, name: str, start_s: float) -> None:
        self._name, self._start_s = name, start_s
        self._folder = tempfile.TemporaryDirectory(prefix="instar-peer-", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)

    def begin(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        """Start `command`, which becomes process 1."""
        apart = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        if os.geteuid() != 0:
            apart += ["--user", "--map-root-user"]
        try:
            with (self.folder / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    [*apart, *command],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
                )  # fmt: skip
        except OSError as error:
            self._folder.cleanup()
            raise PeerUnavailable("peer-start", f"cannot run {self._name}: {error}") from error

    def __enter__(self: P) -> P:
        try:
            self._answer(self._start_s)
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
            why = last_line((self.folder / "log").read_text(errors="replace"))
            why = why if ready else f"no answer in {within_s:g} s"
            raise PeerUnavailable("peer-failed", f"cannot measure {self._name}: {why}")
        answer: dict[str, float] = json.loads(line)
        return answer
