"""Writing behind: a thread that writes and syncs what was checked, while the next chunks are fetched and unpacked.

The disk's time and the network's then run beside each other, and a slow sync does not stop the transfer. The thread
does nothing but write and sync; whoever hands it the chunks asks how far everything is on the disk (`safe`).
"""

from __future__ import annotations

import threading
from collections import deque

from instar.host.files import Disk

HELD = 2 << 20  # bytes that wait at most, beside the chunk that is being written


class Behind:
    """For chunks of one file, one behind the other. Use it as a context manager, and call `finish` inside: leaving
    it without throws away what waits, and lasts as long as the write that is under way."""

    def __init__(self, disk: Disk, fd: int, start: int, every: int) -> None:
        """From byte `start` of the file on; syncs after each `every` bytes."""
        self._disk, self._fd, self._every = disk, fd, every
        self._turn = threading.Condition()
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._held, self._safe, self._written = 0, start, start
        self._ended = False
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="slot-writer", daemon=True)

    def __enter__(self) -> Behind:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._waiting.clear()
        self._end()

    @property
    def safe(self) -> int:
        """Up to this byte of the file everything that was handed over is on the disk."""
        return self._safe

    def put(self, at: int, data: bytes) -> None:
        """To be written at `at`. Waits while too much is waiting. Raises the OSError of an earlier write."""
        with self._turn:
            self._turn.wait_for(lambda: self._held < HELD or self._fault is not None)
            self._raise()
            self._waiting.append((at, data))
            self._held += len(data)
            self._turn.notify_all()

    def finish(self) -> None:
        """All is on the disk when this returns. Raises the OSError of what was not."""
        self._end()
        self._raise()

    def _end(self) -> None:
        with self._turn:
            self._ended = True
            self._turn.notify_all()
        self._thread.join()

    def _raise(self) -> None:
        if self._fault is not None:
            raise self._fault

    # --- in the thread

    def _run(self) -> None:
        try:
            while (chunk := self._next()) is not None:
                self._write(*chunk)
            self._sync()
        except BaseException as error:  # noqa: BLE001 - whatever it was, it is raised where the chunks come from
            with self._turn:
                self._fault = error
                self._turn.notify_all()

    def _next(self) -> tuple[int, bytes] | None:
        with self._turn:
            self._turn.wait_for(lambda: self._waiting or self._ended)
            return self._waiting.popleft() if self._waiting else None

    def _write(self, at: int, data: bytes) -> None:
        self._disk.write_at(self._fd, data, at)
        self._written = at + len(data)
        if self._written - self._safe >= self._every:
            self._sync()
        with self._turn:
            self._held -= len(data)
            self._turn.notify_all()

    def _sync(self) -> None:
        self._disk.sync_open(self._fd)
        self._safe = self._written
