"""Our own keeper (recovery/keep.py): for machines and scratch folders without a service manager.

sysv and OpenRC keep the keeper, which keeps agent and updater: they differ in how it is started and ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time

from instar.core.errors import MachineError
from instar.host import processes
from instar.host.clock import Clock
from instar.host.interpreter import command
from instar.host.layout import LINES, Layout
from instar.host.points import reach
from instar.host.services.base import Manager, RoleLockProbe

KEEPER_UP_S = 30.0  # a small machine that has just booted takes its time
RECORDED_S = 3.0  # from a keeper's lock to its record
POLL_S = 0.01


class ByHand(Manager):
    """Started by `instar start`; it runs until `instar stop`, or until the machine restarts."""

    name = "keeper"

    def __init__(self, layout: Layout, clock: Clock, by: str = "") -> None:
        """`by` is who starts the keeper; '' for `instar start`."""
        super().__init__(layout, clock)
        self.by = by

    def restart(self, role: str) -> None:
        self.end_strays(role)
        self.end(self.recorded(role))
        reach("restart:ended")
        self.start(role)

    def stop(self, role: str) -> None:
        """The keeper goes first, else it would start the role again: stopping one stops keeping both."""
        self.end_keeper()
        for each in (role, *(r for r in LINES if r != role)):
            self.end(self.recorded(each))
            self.end_strays(each)

    def start(self, role: str) -> None:
        """Nudge the keeper to start what does not run, without its wait; start one unless one is there."""
        if not RoleLockProbe(self.layout.role_lock("keep")).held():
            self._wait_kept(self.start_keeper())
            return
        keeper = self.recorded("keep")
        if keeper is not None:
            processes.send(keeper, self.clock.boot_id(), signal.SIGHUP)

    def start_keeper(self) -> subprocess.Popen[bytes] | None:
        """The new keeper's process, where it is ours."""
        return spawn_keeper(self.layout, self.by)

    def end_keeper(self) -> None:
        """Also one that has its lock, and will be recorded in a moment."""
        probe, end = RoleLockProbe(self.layout.role_lock("keep")), self.clock.monotonic() + RECORDED_S
        self.end(self.recorded("keep"))
        while probe.held() and self.clock.monotonic() < end:
            time.sleep(POLL_S)
            self.end(self.recorded("keep"))

    def _wait_kept(self, keeper: subprocess.Popen[bytes] | None) -> None:
        """Wait, with a bound, until the new keeper has its lock: a second one would find it taken. One that ends
        instead is not waited for."""
        probe, end = RoleLockProbe(self.layout.role_lock("keep")), self.clock.monotonic() + KEEPER_UP_S
        while not probe.held() and self.clock.monotonic() < end:
            if keeper is not None and keeper.poll() is not None:
                return
            time.sleep(POLL_S)


def spawn_keeper(layout: Layout, by: str = "") -> subprocess.Popen[bytes]:
    """Start the keeper as a daemon of its own session: it must not die with whoever started it."""
    log = os.open(layout.run / "keeper.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            command(layout.launcher, "keep", "--state", str(layout.state), *(["--by", by] if by else [])),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
            close_fds=True,
        )
    except OSError as error:
        raise MachineError("no-keeper", f"cannot start the keeper: {error}") from None
    finally:
        os.close(log)
