"""Work that is done in order by a thread of its own, while the next piece is fetched: unpacking, writing, hashing.

Python lets go of its lock while it unpacks, hashes, reads and writes. So the network, the processor and the disk are
busy at the same time, and none of them waits for a slow one before more than a little is piled up.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, Self, TypeVar

from instar.host.files import Disk

HELD = 512 << 10  # bytes that wait before a belt at most

T = TypeVar("T")


class Belt(Generic[T]):
    """Calls `work` with each item in the order in which they are put on. Use it as a context manager, and call
    `finish` inside: leaving it without throws away what waits, and lasts as long as the work under way.

    Whatever `work` raises is raised by the next `put` or `finish`; the items behind it are dropped then.
    """

    def __init__(self, name: str, work: Callable[[T], None], most: int = HELD) -> None:
        """`most`: the weight of what may wait."""
        self._work, self._most = work, most
        self._turn = threading.Condition()
        self._waiting: deque[tuple[T, int]] = deque()
        self._weight = 0
        self._full = self._ended = False
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._waiting.clear()
        self._end()

    def put(self, item: T, weight: int) -> None:
        """Waits while too much is waiting; raises what an earlier item's work did."""
        with self._turn:
            while self._full and self._fault is None:
                self._turn.wait()
            self._raise()
            self._waiting.append((item, weight))
            self._weight += weight
            self._full = self._weight >= self._most
            self._turn.notify()

    def finish(self) -> None:
        """All is done when this returns; raises what the work did."""
        self._end()
        self._raise()

    def _end(self) -> None:
        with self._turn:
            self._ended = True
            self._turn.notify()
        self._thread.join()

    def _raise(self) -> None:
        if self._fault is not None:
            raise self._fault

    # --- in the thread

    def _run(self) -> None:
        try:
            while (taken := self._next()) is not None:
                self._work(taken[0])
        except BaseException as error:  # noqa: BLE001 - whatever it was, it is raised where the items come from
            with self._turn:
                self._fault = error
                self._turn.notify()

    def _next(self) -> tuple[T, int] | None:
        """Whoever waits to put more on is woken when half of it is gone: not for each item."""
        with self._turn:
            while not self._waiting and not self._ended:
                self._turn.wait()
            if not self._waiting:
                return None
            taken = self._waiting.popleft()
            self._weight -= taken[1]
            if self._full and self._weight <= self._most // 2:
                self._full = False
                self._turn.notify()
            return taken


class Behind(Belt[tuple[int, bytes]]):
    """Writes what was checked to its place in a file, one behind the other, and syncs on the way."""

    def __init__(self, disk: Disk, fd: int, start: int, every: int) -> None:
        """From byte `start` of the file on; syncs after each `every` bytes, and when it is finished."""
        super().__init__("slot-writer", self._write)
        self._disk, self._fd, self._every = disk, fd, every
        self._written = self._safe = start

    @property
    def written(self) -> int:
        """Up to this byte of the file everything that was put on is written; not all of it is on the disk yet."""
        return self._written

    @property
    def safe(self) -> int:
        """Up to this byte of the file everything that was put on is on the disk."""
        return self._safe

    def finish(self) -> None:
        """All is on the disk when this returns."""
        super().finish()
        self._sync()

    def _write(self, item: tuple[int, bytes]) -> None:
        at, data = item
        self._disk.write_at(self._fd, data, at)
        self._written = at + len(data)
        if self._written - self._safe >= self._every:
            self._sync()

    def _sync(self) -> None:
        self._disk.sync_open(self._fd)
        self._safe = self._written
