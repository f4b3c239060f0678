"""The updater's role: taken from an updater that may be broken, and given back.

While the core has it, no updater works: one that its manager starts finds the role taken and leaves.
"""

from __future__ import annotations

import signal
import time

from instar.core.errors import MachineError
from instar.host import processes
from instar.host.clock import Clock
from instar.host.files import make_folder
from instar.host.layout import Layout
from instar.host.locks import RoleLock
from instar.host.processes import Process
from instar.host.services import GRACE_S, Services

ROLE = "updater"
TAKE_S = 30.0
POLL_S = 0.003  # a manager starts the next updater at once: the lock must be taken before


class UpdatersRole:
    def __init__(self, layout: Layout, clock: Clock, services: Services) -> None:
        self._layout, self._clock, self._services = layout, clock, services
        self._lock = RoleLock(layout.role_lock(ROLE))
        self._record = layout.process(ROLE)
        self.held = False

    def take(self, within_s: float = TAKE_S) -> None:
        """End the recorded updater, and each that comes in its place; have the lock. Idempotent.

        Raises MachineError `lock-held` when the role cannot be had within the bound.
        """
        if self.held:
            return
        make_folder(self._layout.run, 0o700)
        end = time.monotonic() + within_s
        told: dict[Process, float] = {}
        while not self._lock.try_acquire():
            now = time.monotonic()
            if now > end:
                text = f"cannot take the updater's role: somebody holds {self._lock.path} for {within_s:g} s"
                raise MachineError("lock-held", text)
            process = processes.recorded(self._record)
            if process is not None:
                self._end(process, told, now)
            time.sleep(POLL_S)
        self.held = True  # and no record of it: the keeper would adopt this process as the updater

    def _end(self, process: Process, told: dict[Process, float], now: float) -> None:
        """TERM once; KILL after the grace."""
        if process not in told:
            told[process] = now
            processes.send(process, self._clock.boot_id(), signal.SIGTERM)
        elif now - told[process] > GRACE_S:
            processes.send(process, self._clock.boot_id(), signal.SIGKILL)

    def give_back(self, anew: bool = False) -> None:
        """Let the updater have its role, and see that it is started; `anew`: as a new process in any case.
        Idempotent. Raises MachineError when it cannot be started."""
        if not self.held:
            return
        self._lock.release()
        self.held = False
        if anew:
            self._services.restart(ROLE)
        else:
            self._services.start(ROLE)
