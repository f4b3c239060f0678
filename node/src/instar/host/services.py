"""Whoever keeps the node's daemons running: systemd, or our own keeper where nobody else does.

Both start `launch <role>` again whenever the role's process ends, so a restart means: end the
recorded process for certain, and see that somebody will start it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Protocol

from instar.core.errors import MachineError
from instar.host import processes
from instar.host.clock import Clock
from instar.host.interpreter import command
from instar.host.layout import LINES, Layout
from instar.host.locks import RoleLock

GRACE_S = 5.0
SYSTEMCTL_S = 60.0
SYSTEMCTL_TRIES = 3
SYSTEMCTL_PAUSE_S = 1.0
KEEPER_UP_S = 3.0


class Services(Protocol):
    """Idempotent. Each call is bounded, and raises MachineError when it cannot be done."""

    name: str

    def restart(self, role: str) -> None:
        """End the process that plays `role`, if any; a new one is being started when this returns."""

    def stop(self, role: str) -> None:
        """End `role` and keep it ended."""

    def start(self, role: str) -> None:
        """See that `role` runs, or is being started."""


class Systemd:
    """Units `instar-<role>.service` of the system's service manager."""

    name = "systemd"

    def __init__(self, layout: Layout, clock: Clock) -> None:
        self.layout, self.clock = layout, clock

    def restart(self, role: str) -> None:
        self._call("restart", role)

    def stop(self, role: str) -> None:
        self._call("stop", role)

    def start(self, role: str) -> None:
        self._call("start", role)

    def _call(self, verb: str, role: str) -> None:
        """Try a few times: systemd is deaf for a moment when it is updated itself, and says no for as long
        as the machine shuts down. Then TERM comes in the pause, and the next boot goes on from the journal.
        """
        for left in reversed(range(SYSTEMCTL_TRIES)):
            try:
                self._call_once(verb, role)
                return
            except MachineError:
                if not left:
                    raise
            time.sleep(SYSTEMCTL_PAUSE_S)

    def _call_once(self, verb: str, role: str) -> None:
        command = ["systemctl", verb, f"instar-{role}.service"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=SYSTEMCTL_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MachineError("systemctl-failed", f"cannot {verb} {role}: {error}") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()[-500:]
            raise MachineError("systemctl-failed", f"cannot {verb} {role}: {said}")


class ByHand:
    """Our own keeper (`instar keep`), for machines and scratch folders without a service manager."""

    name = "keeper"

    def __init__(self, layout: Layout, clock: Clock) -> None:
        self.layout, self.clock = layout, clock

    def restart(self, role: str) -> None:
        self._end(role)
        self.start(role)

    def stop(self, role: str) -> None:
        """The keeper goes first, else it would start the role again: stopping one stops keeping both."""
        self._end("keep")
        for each in (role, *(r for r in LINES if r != role)):
            self._end(each)

    def start(self, role: str) -> None:
        """Nudge the keeper to start what does not run, without its wait; start one unless one is there."""
        if not RoleLockProbe(self.layout.role_lock("keep")).held():
            spawn_keeper(self.layout)
            self._wait_kept()
            return
        keeper = processes.recorded(self.layout.process("keep"))
        if keeper is not None:
            processes.send(keeper, self.clock.boot_id(), signal.SIGHUP)

    def _wait_kept(self) -> None:
        """Wait, with a bound, until the new keeper has its lock: a second one would find it taken."""
        end = self.clock.monotonic() + KEEPER_UP_S
        while not RoleLockProbe(self.layout.role_lock("keep")).held() and self.clock.monotonic() < end:
            time.sleep(0.01)

    def _end(self, role: str) -> None:
        process = processes.recorded(self.layout.process(role))
        if process is not None:
            processes.stop(process, self.clock.boot_id(), GRACE_S)


class RoleLockProbe:
    """Asks whether somebody holds a role's lock, without keeping it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def held(self) -> bool:
        lock = RoleLock(self.path)
        if lock.try_acquire():
            lock.release()
            return False
        return True


def spawn_keeper(layout: Layout) -> None:
    """Start the keeper as a daemon of its own session: it must not die with whoever started it."""
    log = os.open(layout.run / "keeper.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        subprocess.Popen(
            command(layout.launcher, "keep", "--state", str(layout.state)),
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


def services_of(layout: Layout, clock: Clock) -> Services:
    """The manager that `install` wrote down; the keeper where the record is absent or unreadable."""
    try:
        manager = json.loads((layout.state / "service.json").read_bytes())["manager"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        manager = "keeper"
    return Systemd(layout, clock) if manager == "systemd" else ByHand(layout, clock)
