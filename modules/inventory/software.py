"""What runs on the machine: the system itself, and its processes in a few numbers."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Any

from files import line, names, pairs, text

PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")
MOST_PROCESSES = 20_000
LARGEST = 10  # processes shown by memory, and by processor time
MOST_NAMES = 100
STATES = {
    "R": "running", "S": "sleeping", "D": "waiting for a device", "Z": "zombie", "T": "stopped", "t": "traced",
    "I": "idle",
}  # fmt: skip


def system(root: str = "") -> dict[str, Any]:
    """All of this stands still while the machine runs, but for `uptime_s`."""
    release = _release(root)
    host = os.uname()
    return {
        "name": host.nodename,
        "os": release.get("PRETTY_NAME") or release.get("NAME", ""),
        "os_id": release.get("ID", ""),
        "os_version": release.get("VERSION_ID", ""),
        "kernel": host.release,
        "kernel_build": host.version,
        "boot_id": line(f"{root}/proc/sys/kernel/random/boot_id"),
        "booted": _booted(root),
        "uptime_s": round(_uptime(root)),
        "timezone": _timezone(root),
        "first_process": line(f"{root}/proc/1/comm"),
    }


def _release(root: str) -> dict[str, str]:
    content = text(f"{root}/etc/os-release") or text(f"{root}/usr/lib/os-release")
    return {key: value.strip("\"'")[:200] for key, value in pairs(content, "=").items()}


def _uptime(root: str) -> float:
    try:
        return float(text(f"{root}/proc/uptime").split()[0])
    except (ValueError, IndexError):
        return 0.0


def _booted(root: str) -> int:
    """Unix time of the start; moves when the clock is set, so it is not compared."""
    value = pairs(text(f"{root}/proc/stat", 8 << 20), " ").get("btime", "")
    return int(value) if value.isdecimal() else 0


def _timezone(root: str) -> str:
    """Its name, from where /etc/localtime points, or from Debian's file; 'UTC' where nothing is set."""
    try:
        _, found, name = os.path.realpath(f"{root}/etc/localtime", strict=True).partition("/zoneinfo/")
    except OSError:
        return line(f"{root}/etc/timezone") or "UTC"
    return name if found else line(f"{root}/etc/timezone") or time.tzname[0]


def processes(root: str = "") -> dict[str, Any]:
    """Numbers, and the largest. Not compared: processes come and go."""
    found: list[dict[str, Any]] = []
    for name in names(f"{root}/proc"):
        if name.isdecimal() and len(found) < MOST_PROCESSES and (one := _process(root, int(name))):
            found.append(one)
    states = Counter(STATES.get(one["state"], one["state"]) for one in found)
    programs = Counter(one["name"] for one in found if one["memory"])
    return {
        "count": len(found),
        "threads": sum(one["threads"] for one in found),
        "states": dict(states.most_common()),
        "load": [float(word) for word in line(f"{root}/proc/loadavg").split()[:3]],
        "by_memory": [_shown(one) for one in sorted(found, key=lambda one: -one["memory"])[:LARGEST]],
        "by_cpu": [_shown(one) for one in sorted(found, key=lambda one: -one["cpu_s"])[:LARGEST]],
        "programs": dict(programs.most_common(MOST_NAMES)),
    }


def _process(root: str, pid: int) -> dict[str, Any] | None:
    """From /proc/<pid>/stat; a name may hold blanks and parentheses, so the last one counts."""
    head, mark, tail = text(f"{root}/proc/{pid}/stat", 4096).rpartition(")")
    fields = tail.split()
    if not mark or len(fields) < 22:
        return None
    return {
        "pid": pid,
        "name": head.partition("(")[2],
        "state": fields[0],
        "cpu_s": (int(fields[11]) + int(fields[12])) / TICKS,
        "threads": int(fields[17]),
        "memory": int(fields[21]) * PAGE,
    }


def _shown(one: dict[str, Any]) -> dict[str, Any]:
    return {name: one[name] for name in ("pid", "name", "memory", "cpu_s")}
