"""systemd: the units that `install` writes (cli/units.py)."""

from __future__ import annotations

import time
from pathlib import Path

from instar.core.errors import MachineError
from instar.host.services.base import Manager, call

TRIES = 3
PAUSE_S = 1.0


class Systemd(Manager):
    """Units `instar-<role>.service` of the system's service manager."""

    name = "systemd"

    def restart(self, role: str) -> None:
        """A process that belongs to the unit itself is ended with it, systemctl too: then the order is only
        handed in, and systemd goes on by itself."""
        self.end_strays(role)
        if in_unit(Path("/proc/self"), role) is not None:
            self._call("--no-block", "restart", role=role)
            return
        old = self.recorded(role)
        self._call("restart", role=role)
        self.end(old)  # also the recorded one that was started by hand: the unit gets its role then

    def stop(self, role: str) -> None:
        old = self.recorded(role)
        self._call("stop", role=role)
        self.end(old)
        self.end_strays(role)

    def start(self, role: str) -> None:
        self._call("start", role=role)

    def _call(self, *words: str, role: str) -> None:
        """Try a few times: systemd is deaf for a moment when it is updated itself, and says no for as long
        as the machine shuts down. Then TERM comes in the pause, and the next boot goes on from the journal.
        """
        for left in reversed(range(TRIES)):
            try:
                call(["systemctl", *words, f"instar-{role}.service"], f"{words[-1]} the {role}")
                return
            except MachineError:
                if not left:
                    raise
            time.sleep(PAUSE_S)


def in_unit(process: Path, role: str) -> str | None:
    """The cgroup of a process (`/proc/<pid>`) if it is below the unit of `role`, else None."""
    try:
        lines = (process / "cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    unit = f"instar-{role}.service"
    groups = (line.split(":", 2)[-1] for line in lines)
    return next((group for group in groups if unit in group.split("/")), None)
