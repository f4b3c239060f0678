"""`cycle agent --state DIR --command ID`: have the agent restarted in the way it was started (host/services).

Started by the agent itself for a restart command (requirement W5), in a session of its own: the agent goes on
until it is stopped, and whatever stops it cannot take this process along. An agent that has been replaced
meanwhile is left alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from instar.core.errors import InputError, InstarError, MachineError
from instar.host import processes
from instar.host.clock import Clock
from instar.host.layout import Layout
from instar.host.points import reach
from instar.host.services import running

USAGE = "usage: instar cycle agent --state DIR --command ID"
ROLE = "agent"


def cycle(layout: Layout, clock: Clock, asker: int) -> bool:
    """Restart the agent if it still is the process `asker`; whether it was. Raises MachineError."""
    process = processes.recorded(layout.process(ROLE))
    if process is not None and (process.pid != asker or not processes.alive(process, clock.boot_id())):
        return False
    reach("cycle:begun")
    running(layout, clock).restart(ROLE)
    reach("cycle:ended")
    return True


def main(argv: list[str]) -> int:
    asker = os.getppid()
    try:
        if len(argv) != 5 or (argv[0], argv[1], argv[3]) != (ROLE, "--state", "--command"):
            raise InputError("usage", USAGE)
        done = cycle(Layout(Path(argv[2])), Clock(), asker)
    except InstarError as error:
        print(f"instar cycle: {error.text} ({error.code})", file=sys.stderr, flush=True)
        return error.exit_status
    except OSError as error:
        print(f"instar cycle: cannot restart the agent: {error}", file=sys.stderr, flush=True)
        return MachineError.exit_status
    if not done:
        print(f"instar cycle: the agent that asked ({argv[4]}) is gone already", file=sys.stderr, flush=True)
    return 0
