"""What a role said lately, from wherever its words go: for whoever must tell why a release did not come up.

Never fails: what cannot be read is ''.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from instar.core.errors import MachineError
from instar.host.clock import Clock
from instar.host.layout import Layout
from instar.host.services.base import call

MOST_BYTES = 4096
MOST_LINES = 40
CALL_S = 5.0


def mark(layout: Layout, role: str, manager: str, clock: Clock) -> dict[str, Any]:
    """Where the words of `role` stand now: what comes later is told apart from what was there before."""
    try:
        size = _log(layout, role, manager).stat().st_size
    except OSError:
        size = 0
    return {"bytes": size, "wall": round(clock.wall(), 3)}


def tail(layout: Layout, role: str, manager: str, since: dict[str, Any]) -> str:
    """The last words of `role` after the mark `since`, at most 4 KiB. `manager` is that of host/services."""
    if manager == "systemd":
        return _cut(_from_journal(role, since.get("wall", 0)).encode())
    return _cut(_from_file(_log(layout, role, manager), since.get("bytes", 0)))


def _log(layout: Layout, role: str, manager: str) -> Path:
    return layout.run / f"{role}-log" / "current" if manager == "runit" else layout.run / f"{role}.log"


def _from_journal(role: str, wall: object) -> str:
    since = float(wall) if isinstance(wall, (int, float)) else 0.0
    words = ["journalctl", "-q", "--no-pager", "-u", f"instar-{role}", "-n", str(MOST_LINES), "-o", "cat"]
    try:
        return call([*words, f"--since=@{since:.3f}"], f"read what the {role} said", CALL_S)
    except (MachineError, OSError):
        return ""


def _from_file(path: Path, start: object) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            first = start if isinstance(start, int) and 0 <= start <= size else 0  # else it was put aside
            file.seek(max(first, size - MOST_BYTES))
            return file.read(MOST_BYTES)
    except OSError:
        return b""


def _cut(data: bytes) -> str:
    """The last lines and bytes, as text that takes no more than MOST_BYTES."""
    text = "\n".join(data.decode(errors="replace").splitlines()[-MOST_LINES:])
    return text.encode()[-MOST_BYTES:].decode(errors="ignore").strip()
