"""The clocks. Leases and deadlines use boot and monotonic time; wall time is for display only."""

from __future__ import annotations

import time
from pathlib import Path


class Clock:
    """The machine's clocks, in seconds. Tests hand in their own with the same methods."""

    def monotonic(self) -> float:
        return time.monotonic()

    def boottime(self) -> float:
        """Seconds since this boot, time asleep included (CLOCK_BOOTTIME)."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall(self) -> float:
        return time.time()

    def boot_id(self) -> str:
        """The kernel's random name of this boot; '' where the kernel does not tell."""
        try:
            return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return ""
