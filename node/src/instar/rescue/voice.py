"""What the core says: JSON lines on its standard output, whose form never changes (docs/protocol.md).

    {"progress":{"phase","percent","text"}}   {"downloaded":"<sha384>"}   {"ended":{"ok","code","text"}}

Whoever listens may die, for it may be what gets replaced, or stop reading: nothing here fails or waits long.
"""

from __future__ import annotations

import json
import os
import select
import time
from typing import Any

from instar.core.journal import Progress

OUT = 1
TAKEN_WITHIN_S = 1.0
MOST_TEXT = 1000  # characters
QUIET_S = 0.1  # between two words about the same phase


class Voice:
    """Implements `instar.engine.driver.Follower`."""

    def __init__(self, fd: int = OUT) -> None:
        self._fd, self._deaf = fd, False
        self._phase, self._percent, self._said_at = "", -1, 0.0

    def progress(self, phase: str, percent: float = -1.0, text: str = "") -> None:
        """`percent` of this phase, 0 to 100; -1: not told. What comes too often is left out."""
        now, whole = time.monotonic(), int(percent)
        if phase == self._phase and not text:
            soon = now - self._said_at < QUIET_S and whole < 100
            if whole == self._percent or soon:
                return
        self._phase, self._percent, self._said_at = phase, whole, now
        self._say({"progress": {"phase": phase, "percent": round(percent, 1), "text": text[:MOST_TEXT]}})

    def downloaded(self, sha384: str) -> None:
        self._say({"downloaded": sha384})

    def ended(self, ok: bool, code: str = "", text: str = "") -> None:
        self._say({"ended": {"ok": ok, "code": code, "text": text[:MOST_TEXT]}})

    def changed(self, progress: Progress) -> None:
        """A transaction has reached another state."""
        why = progress.reason.text if progress.reason else ""
        self.progress(f"{progress.begin.line}:{progress.state.value}", text=why)

    def _say(self, words: dict[str, Any]) -> None:
        data = json.dumps(words).encode() + b"\n"
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        if self._deaf or not poller.poll(TAKEN_WITHIN_S * 1000):
            self._deaf = True
            return
        try:
            os.write(self._fd, data)  # less than a pipe takes at once
        except OSError:
            self._deaf = True
