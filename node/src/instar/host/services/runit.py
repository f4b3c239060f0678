"""runit: a service folder for each role, which runs the launcher itself.

/etc/sv/instar-<role>/       made by `install` (cli/scripts.py)
<scanned>/instar-<role>      a link to it, made by the first start: runsvdir finds it there and keeps it running
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from instar.core.errors import MachineError
from instar.host.files import point_link
from instar.host.services.base import GRACE_S, Manager, call

FOLDER = Path("/etc/sv")
SCANNED = (Path("/etc/service"), Path("/var/service"), Path("/service"))  # where nobody says otherwise
FOUND_S = 10.0  # runsvdir looks every five seconds
POLL_S = 0.05


class Runit(Manager):
    """Services `instar-<role>`."""

    name = "runit"

    def restart(self, role: str) -> None:
        self.end_strays(role)
        if not self._supervised(role):
            self.start(role)
            return
        old = self.recorded(role)
        self._sv("force-restart", role)
        self.end(old)

    def stop(self, role: str) -> None:
        old = self.recorded(role)
        if self._supervised(role):
            self._sv("force-stop", role)
        self.end(old)
        self.end_strays(role)

    def start(self, role: str) -> None:
        link = scanned_folder() / f"instar-{role}"
        if not link.is_symlink():
            point_link(link, str(FOLDER / link.name))
        end = self.clock.monotonic() + FOUND_S
        while not self._supervised(role):
            if self.clock.monotonic() > end:
                text = (
                    f"cannot start the {role}: no runsv for {link} within {FOUND_S:g} s; is runsvdir running?"
                )
                raise MachineError("sv-failed", text)
            time.sleep(POLL_S)
        self._sv("up", role)

    def _supervised(self, role: str) -> bool:
        """Whether a runsv listens: opening its pipe for writing fails at once where none does."""
        try:
            os.close(os.open(FOLDER / f"instar-{role}/supervise/ok", os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    def _sv(self, verb: str, role: str) -> None:
        """The `force-` verbs kill after the grace, and then end with 1 though all is well."""
        good = (0, 1) if verb.startswith("force-") else (0,)
        words = ["sv", "-w", f"{GRACE_S:.0f}", verb, str(FOLDER / f"instar-{role}")]
        call(words, f"{verb} the {role}", good=good)


def scanned_folder(proc: Path = Path("/proc")) -> Path:
    """The folder that the running runsvdir scans. Raises MachineError when none runs."""
    for path in proc.glob("[0-9]*/comm"):
        try:
            if path.read_text() != "runsvdir\n":
                continue
            words = path.with_name("cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        # `runsvdir [-P] DIR [LOG]`
        named = next((word for word in words[1:] if word.startswith(b"/")), None)
        if named is not None:
            return Path(os.fsdecode(named))
        found = next((folder for folder in SCANNED if folder.is_dir()), None)
        if found is not None:
            return found
    raise MachineError(
        "no-runsvdir", "cannot use runit: expected a running runsvdir, got none; start it first"
    )
