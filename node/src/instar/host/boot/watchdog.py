"""Whether a hardware watchdog goes on watching across kexec: only then is a new kernel that hangs reset.

By default most drivers stop theirs when the machine goes down, and kexec is going down. `stop_on_reboot` of the
kernel's watchdog core (kernel documentation, watchdog-parameters) says otherwise: 0 keeps it running, 1 stops
it, -1 leaves it to the driver. A driver looks at it when it starts, so it belongs on the command line of the
images; where the kernel lets it be written, that is done too, for drivers that start later.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

PARAMETER = Path("/sys/module/watchdog/parameters/stop_on_reboot")
DEVICES = Path("/sys/class/watchdog")


class Watchdog(NamedTuple):
    parameter: Path = PARAMETER
    devices: Path = DEVICES

    def across_kexec(self) -> str:
        """`none` when nobody watches now; `runs` or `stops`: what kexec does to the one that does. Not sure
        is `stops`."""
        if not self._watched():
            return "none"
        return "runs" if _text(self.parameter) == "0" else "stops"

    def keep(self) -> bool:
        """Ask for it to be kept running across kexec; whether the kernel took it."""
        if _text(self.parameter) in ("0", ""):
            return False
        try:
            self.parameter.write_text("0")
        except OSError:
            return False  # most kernels take it on their command line only
        return _text(self.parameter) == "0"

    def _watched(self) -> bool:
        """A device without a `state` (kernels without watchdog sysfs) counts as one that watches."""
        try:
            found = sorted(self.devices.iterdir())
        except OSError:
            return False
        return any(_text(device / "state") in ("active", "") for device in found)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
