"""The machine's way down: by its service manager where there is one; and by the kernel's own call where not.

Both calls return at once; the machine is down some time later, or never: who calls looks at the clock.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from instar.core.errors import MachineError

SYSTEMD = Path("/run/systemd/system")
CALL_S = 30.0
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class GoingDown:
    """Implements `instar.targets.slots.platform.Power`. `jump` goes into the loaded kernel without anybody's help."""

    def __init__(self, jump: Callable[[], None]) -> None:
        self._jump = jump

    def reboot(self) -> None:
        """Raises MachineError `no-reboot`."""
        os.sync()
        if SYSTEMD.is_dir():
            _call("systemctl", "--no-block", "reboot")
        else:
            _call("reboot")

    def kexec(self) -> None:
        """Raises MachineError `no-reboot`."""
        os.sync()
        if SYSTEMD.is_dir():
            _call("systemctl", "--no-block", "kexec")
        else:
            self._jump()


def _call(*words: str) -> None:
    program = shutil.which(words[0], path=PATH)
    if program is None:
        raise MachineError("no-reboot", f"cannot restart the machine: {words[0]} is not there")
    try:
        done = subprocess.run(
            [program, *words[1:]], stdin=subprocess.DEVNULL, capture_output=True, timeout=CALL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError("no-reboot", f"cannot restart the machine: {error}") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()[-300:]
        raise MachineError("no-reboot", f"cannot restart the machine: {' '.join(words)}: {said}")
