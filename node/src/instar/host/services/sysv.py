"""sysv: an init script that starts and stops the keeper, called through `service`."""

from __future__ import annotations

from pathlib import Path

from instar.host.services.base import call
from instar.host.services.keeper import ByHand

SCRIPT = Path("/etc/init.d/instar")


class Sysv(ByHand):
    """/etc/init.d/instar (cli/scripts.py). Nobody looks after the keeper itself before the next start-up."""

    name = "sysv"

    def start_keeper(self) -> None:
        call(["service", "instar", "start"], "start the keeper")

    def end_keeper(self) -> None:
        keeper = self.recorded("keep")
        if SCRIPT.exists():
            call(["service", "instar", "stop"], "stop the keeper")
        self.end(keeper)
