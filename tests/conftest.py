"""For all tests."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """An interruption ends what a test starts, also where the shell that began the tests ignores it in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
