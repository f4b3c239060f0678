"""An agent that somebody started by hand, with nobody to look after it: a child of its own does it (W5).

The old process goes on until it is told to stop. It is ended for certain before the new one is started, and
the role's lock sees to it that there are never two.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from instar.core.errors import MachineError
from instar.host import processes
from instar.host.interpreter import command
from instar.host.locks import RoleLock
from instar.host.services.base import GRACE_S, Manager, RoleLockProbe

UP_S = 30.0  # one that ends sooner is seen at once
TURN_S = 2 * (GRACE_S + 5.0) + UP_S  # as long as the restart before ours may take
POLL_S = 0.01


class Bare(Manager):
    """The launcher in a session of its own, with what the old process was given: further arguments,
    environment, and where it writes its log."""

    name = "bare"

    def restart(self, role: str) -> None:
        with self._turn(role):
            old = self.recorded(role)
            like = old if self._runs(old) else next(iter(self.strays(role)), None)
            start = Start.like(like)
            try:
                self.end_strays(role)
                self.end(old)
                self._start(role, start)
            finally:
                start.close()

    def stop(self, role: str) -> None:
        with self._turn(role):
            self.end(self.recorded(role))
            self.end_strays(role)

    def start(self, role: str) -> None:
        with self._turn(role):
            if not self._runs(self.recorded(role)):
                start = Start.like(None)
                self._start(role, start)

    def _turn(self, role: str) -> RoleLock:
        """One at a time: two who restart the same role would each start one."""
        lock = RoleLock(self.layout.run / f"start-{role}.lock")
        lock.acquire(TURN_S)
        return lock

    def _runs(self, process: processes.Process | None) -> bool:
        return process is not None and processes.alive(process, self.clock.boot_id())

    def _start(self, role: str, start: Start) -> None:
        log = start.log
        if log < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            log = os.open(self.layout.run / f"{role}.log", flags, 0o600)
        words = command(self.layout.launcher, "launch", role, "--state", str(self.layout.state))
        try:
            child = subprocess.Popen(
                [*words, *start.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=start.environment,
                start_new_session=True,
            )
        except OSError as error:
            raise MachineError("not-started", f"cannot start the {role}: {error}") from None
        finally:
            if log != start.log:
                os.close(log)
        self._wait_up(role, child)

    def _wait_up(self, role: str, child: subprocess.Popen[bytes]) -> None:
        """Until the new process has the role. Raises MachineError when it ends instead, or takes too long."""
        lock, end = RoleLockProbe(self.layout.role_lock(role)), self.clock.monotonic() + UP_S
        while self.clock.monotonic() < end:
            if (status := child.poll()) is not None:
                text = f"cannot start the {role}: it ended with status {status}; its words are in its log"
                raise MachineError("not-started", text)
            recorded = self.recorded(role)
            if recorded is not None and recorded.pid == child.pid and lock.held():
                return
            time.sleep(POLL_S)
        raise MachineError("not-started", f"cannot start the {role}: it did not take its role in {UP_S:g} s")


class Start:
    """What a new process is started with. `log` is a descriptor, -1 where the old one's cannot be had."""

    def __init__(self, arguments: list[str], environment: dict[str, str] | None, log: int) -> None:
        self.arguments, self.environment, self.log = arguments, environment, log

    @classmethod
    def like(cls, process: processes.Process | None) -> Start:
        """As the running `process` was; for None, as a new one."""
        if process is None:
            return cls([], None, -1)
        place = Path(f"/proc/{process.pid}")
        try:
            words = [os.fsdecode(word) for word in (place / "cmdline").read_bytes().split(b"\0")[:-1]]
            pairs = [
                os.fsdecode(each).partition("=") for each in (place / "environ").read_bytes().split(b"\0")
            ]
        except OSError:
            return cls([], None, -1)
        try:
            log = os.open(
                place / "fd/2", os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK
            )
        except OSError:
            log = -1  # a socket, or gone
        else:
            os.set_blocking(log, True)
        return cls(further(words), {name: value for name, equals, value in pairs if equals}, log)

    def close(self) -> None:
        if self.log >= 0:
            os.close(self.log)


def further(words: list[str]) -> list[str]:
    """What a role's command line has beside its name and state folder: `… instar.pyz agent --state DIR --log json`."""
    if "--state" not in words[:-1]:
        return []
    at = words.index("--state")
    program = next((n for n, word in enumerate(words) if word.endswith(".pyz")), 0)
    between = words[program + 1 : at]
    return [word for word in between if word not in ("launch", "agent", "updater")] + words[at + 2 :]
