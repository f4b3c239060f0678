"""The updater's role: taken from an updater that may be broken, and given back.

While the core has it, no updater works: one that its manager starts finds the role taken and leaves.
"""

from __future__ import annotations

import contextlib
import signal
import time

from instar.core.errors import MachineError
from instar.host import processes, strays
from instar.host.clock import Clock
from instar.host.files import make_folder
from instar.host.layout import Layout
from instar.host.locks import RoleLock
from instar.host.processes import Process
from instar.host.services import GRACE_S, Services
from instar.host.services.base import call

ROLE = "updater"
TAKE_S = 30.0
NOBODY_S = 1.5  # an updater has its lock a moment before its record; one that has none for longer is a stray
LOOK_S = 0.5  # between two looks at all processes
STOP_S = 12.0  # for systemd to end its unit: the grace, and a little
POLL_S = 0.003  # a manager starts the next updater at once: the lock must be taken before


class UpdatersRole:
    def __init__(self, layout: Layout, clock: Clock, services: Services) -> None:
        self._layout, self._clock, self._services = layout, clock, services
        self._lock = RoleLock(layout.role_lock(ROLE))
        self._record = layout.process(ROLE)
        self.held = False

    def take(self, within_s: float = TAKE_S) -> None:
        """End the recorded updater, and each that comes in its place; have the lock. Idempotent.

        Where no record names one that lives (it is damaged, or of another), who executes the role is ended.

        Raises MachineError `lock-held` when the role cannot be had within the bound.
        """
        if self.held:
            return
        make_folder(self._layout.run, 0o700)
        end = time.monotonic() + within_s
        told: dict[Process, float] = {}
        nameless = Nameless(self._layout, self._clock, self._services)
        while not self._lock.try_acquire():
            now = time.monotonic()
            if now > end:
                text = f"cannot take the updater's role: somebody holds {self._lock.path} for {within_s:g} s"
                raise MachineError("lock-held", text)
            process = processes.recorded(self._record)
            known = process is not None and processes.alive(process, self._clock.boot_id())
            for each in [process] if process is not None and known else nameless.look(now):
                self._end(each, told, now)
            if known:
                nameless.reset()
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


class Nameless:
    """Updaters that no record names."""

    def __init__(self, layout: Layout, clock: Clock, services: Services) -> None:
        self._layout, self._clock, self._services = layout, clock, services
        self._since: float | None = None  # when there was no usable record any more
        self._next = 0.0
        self._stopped = False

    def reset(self) -> None:
        self._since = None

    def look(self, now: float) -> list[Process]:
        """Those that are there, when it is time to look. The first look under systemd has it end its unit."""
        if self._since is None:
            self._since = now
        if now - self._since < NOBODY_S or now < self._next:
            return []
        if self._services.name == "systemd" and not self._stopped:
            self._stopped = True  # once: `give_back` has it started again
            with contextlib.suppress(MachineError):
                call(["systemctl", "stop", f"instar-{ROLE}.service"], f"stop the {ROLE}", STOP_S)
            return []
        self._next = now + LOOK_S
        return strays.find(self._layout, ROLE, self._clock.boot_id())
