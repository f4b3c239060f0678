"""The clocks. Leases and deadlines use boot and monotonic time; wall time is for display only."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Clock:
    """The machine's clocks, in seconds. Tests hand in their own with the same methods."""

    def monotonic(self) -> float:
        return time.monotonic()

    def boottime(self) -> float:
        """Seconds since this boot, time asleep included (CLOCK_BOOTTIME)."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def booted(self) -> float:
        """When this boot began, in seconds of boot time: 0 on a machine. A container has boots of its own, but its
        machine's clock; they begin with its process 1 (field 22 of /proc/1/stat, proc(5)). 0 where that is hidden."""
        try:
            fields = Path("/proc/1/stat").read_text().rpartition(")")[2].split()
            return int(fields[19]) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError, ValueError):
            return 0.0

    def wall(self) -> float:
        return time.time()

    def boot_id(self) -> str:
        """The kernel's random name of this boot; '' where the kernel does not tell."""
        try:
            return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return ""
