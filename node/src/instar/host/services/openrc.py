"""OpenRC: a service whose supervise-daemon looks after the keeper."""

from __future__ import annotations

from pathlib import Path

from instar.host.services.base import call
from instar.host.services.keeper import ByHand

SCRIPT = Path("/etc/init.d/instar")


class OpenRc(ByHand):
    """The service `instar` (cli/scripts.py)."""

    name = "openrc"

    def start_keeper(self) -> None:
        call(["rc-service", "instar", "start"], "start the keeper")

    def end_keeper(self) -> None:
        keeper = self.recorded("keep")
        if SCRIPT.exists():
            call(["rc-service", "instar", "stop"], "stop the keeper")
        self.end(keeper)
