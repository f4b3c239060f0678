"""`instarctl` as a process of its own, for tests that do something while it follows."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from dataclasses import dataclass

from tests.server.world import ROOT, WITHIN_S, World


@dataclass(frozen=True)
class Done:
    exit_code: int
    stdout: str
    stderr: str


class Following:
    """`until_said` waits for words on stderr, `done` for the end."""

    def __init__(self, world: World, *words: str) -> None:
        environment = {
            **os.environ,
            **world.access(),
            "COLUMNS": "200",
            "PYTHONPATH": os.pathsep.join(str(ROOT / part / "src") for part in ("node", "server")),
        }
        name = world.folder / f"following-{os.urandom(4).hex()}"
        self._out, self._error = name.with_suffix(".out"), name.with_suffix(".error")
        command = [sys.executable, "-m", "instar_server.ctl.main", *words]
        with self._out.open("wb") as out, self._error.open("wb") as error:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=error
            )

    def has_said(self, words: str) -> bool:
        return words in self._error.read_text(errors="replace")

    async def until_said(self, words: str) -> None:
        until = time.monotonic() + WITHIN_S
        while not self.has_said(words):
            assert time.monotonic() < until, self._said()
            assert self._process.poll() is None or self.has_said(words), self._said()
            await asyncio.sleep(0.05)

    async def done(self) -> Done:
        try:
            status = await asyncio.to_thread(self._process.wait, WITHIN_S)
        finally:
            self._process.kill()
        return Done(status, *self._said())

    def _said(self) -> tuple[str, str]:
        return self._out.read_text(), self._error.read_text()
