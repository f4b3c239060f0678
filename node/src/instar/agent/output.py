"""What a job says while it runs, as `output` frames: at most FRAMES_A_S and BYTES_A_S for each job.

What comes between two frames is put together: log lines into one text, progress to its last state. What
does not fit is dropped and counted. Nothing is kept: a frame that cannot be sent is lost, and `seq` shows it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from instar.wire.messages import Message, Output

FRAMES_A_S = 20
BYTES_A_S = 65_536
MOST_TEXT = BYTES_A_S // 4  # bytes of one frame
MOST_WORDS = 500  # characters of a progress text


class JobOutput:
    """`heed` takes the runner's lines, `end` sends the rest."""

    def __init__(self, job_id: str, send: Callable[[Message], object]) -> None:
        self._id, self._send = job_id, send
        self._loop = asyncio.get_running_loop()
        self._seq = 0
        self._lines: list[str] = []
        self._size = self._dropped = 0
        self._progress: tuple[float, str] | None = None
        self._may_send = self._loop.time()
        self._bytes, self._counted = float(BYTES_A_S), self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def heed(self, message: dict[str, Any]) -> None:
        """One line of a runner; one that is neither log nor progress is not ours."""
        text = message.get("log")
        if isinstance(text, str):
            self._add(text)
        elif isinstance(fraction := message.get("progress"), (int, float)):
            words = message.get("text", "")
            self._progress = _fraction(fraction), words[:MOST_WORDS] if isinstance(words, str) else ""
        else:
            return
        if self._timer is None:
            wait_s = self._may_send - self._loop.time()
            if wait_s <= 0:
                self._flush()
            else:
                self._timer = self._loop.call_later(wait_s, self._flush)

    def end(self) -> None:
        """Send what waits, before the result."""
        if self._timer is not None:
            self._timer.cancel()
        if self._lines or self._dropped or self._progress:
            self._flush(last=True)

    def _add(self, text: str) -> None:
        size = len(text.encode("utf-8", "replace")) + 1
        if self._size + size > min(MOST_TEXT, self._budget()):
            self._dropped += size
        else:
            self._lines.append(text)
            self._size += size

    def _budget(self) -> float:
        """Bytes that may be sent now."""
        now = self._loop.time()
        self._bytes = min(BYTES_A_S, self._bytes + (now - self._counted) * BYTES_A_S)
        self._counted = now
        return self._bytes

    def _flush(self, last: bool = False) -> None:
        """One frame for the log, or else one for the progress; the next a twentieth of a second later."""
        self._timer = None
        if self._lines or self._dropped:
            self._bytes = self._budget() - self._size
            if self._dropped:
                self._lines.append(f"({self._dropped} bytes are left out)")
            self._emit("log", _text("\n".join(self._lines)), -1.0)
            self._lines, self._size, self._dropped = [], 0, 0
            if not last:
                self._again()
                return
        if self._progress:
            fraction, words = self._progress
            self._progress = None
            self._emit("progress", _text(words), fraction)
            self._again()

    def _again(self) -> None:
        self._may_send = self._loop.time() + 1 / FRAMES_A_S
        if self._progress:
            self._timer = self._loop.call_later(1 / FRAMES_A_S, self._flush)

    def _emit(self, kind: str, text: str, fraction: float) -> None:
        self._seq += 1
        self._send(Output(self._id, self._seq, kind, text, fraction))


def _text(value: str) -> str:
    """Whole characters only: a module may have said half a surrogate."""
    return value.encode("utf-8", "replace").decode()


def _fraction(value: float) -> float:
    """-1 for what is no part of a whole."""
    return float(value) if 0 <= value <= 1 else -1.0
