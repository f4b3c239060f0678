"""Locks that the kernel drops when their holder dies."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from instar.core.errors import MachineError

POLL_S = 0.01


class RoleLock:
    """An exclusive flock on a file. Held until `release` or the end of the process.

    The descriptor is not inherited: a child never keeps its parent's role.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def try_acquire(self) -> bool:
        """Take the lock if it is free. Idempotent while held."""
        if self._fd is not None:
            return True
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd = fd
        return True

    def acquire(self, timeout_s: float) -> None:
        """Take the lock, waiting at most `timeout_s`. Raises MachineError `lock-held`."""
        end = time.monotonic() + timeout_s
        while not self.try_acquire():
            if time.monotonic() >= end:
                raise MachineError("lock-held", f"cannot lock {self.path}: another process holds it")
            time.sleep(POLL_S)

    def release(self) -> None:
        if self._fd is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # a child that is about to exec may hold a copy for a moment
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> RoleLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
