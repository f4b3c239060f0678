"""A bound on a piece of work that has none of its own: SIGALRM, so in the main thread only."""

from __future__ import annotations

import contextlib
import errno
import signal
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the body when it takes longer than `seconds`. Does not nest."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(errno.ETIMEDOUT, f"it took longer than {seconds:g} s")

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
