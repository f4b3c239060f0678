"""Files that lie ready for what comes next: full of zeros, on the disk with their names.

Writing over one of them is one sync that allocates nothing and names nothing, where a new file takes two, each
of which waits for the file system's journal. They are made by a thread, since that takes some ten
milliseconds, and not before something has been asked for: a resident that does nothing has neither.
"""

from __future__ import annotations

import contextlib
import os
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable
from pathlib import Path

from instar.core.errors import MachineError
from instar.host.files import Disk, make_folder

SIZE = 8_192  # bytes; a job and its result seldom have more
COUNT = 16
LEAST = 8  # fewer, and more are made


def in_a_thread(work: Callable[[], None]) -> None:
    start_new_thread(work, ())


class Spares:
    """`folder` is theirs alone. `apart` runs the making of them."""

    def __init__(self, folder: Path, disk: Disk, apart: Callable[[Callable[[], None]], None]) -> None:
        self._folder, self._disk, self._apart = folder, disk, apart
        self._ready: deque[Path] = deque()
        self._making = False
        self._number = 0

    def found(self) -> list[Path]:
        """What was left there, written to or not. Nobody hands it out again."""
        try:
            return sorted(self._folder / name for name in os.listdir(self._folder))
        except OSError:
            return []

    def take(self, size: int) -> Path | None:
        """One that holds `size` bytes, or None: then an ordinary file must do."""
        if len(self._ready) < LEAST and not self._making:
            self._making = True
            try:
                self._apart(self._make)
            except RuntimeError:  # no thread is to be had
                self._making = False
        return self._ready.popleft() if size <= SIZE and self._ready else None

    def _make(self) -> None:
        """All of them, and then one sync for their names. What cannot be made is not there."""
        made: list[Path] = []
        try:
            make_folder(self._folder, 0o700, self._disk)
            for _ in range(COUNT - len(self._ready)):
                self._number += 1
                # Never a name twice: the disk may still know the file that had it before.
                path = self._folder / f"{os.getpid()}-{self._number}-{os.urandom(4).hex()}"
                made.append(path)
                self._disk.write_new(path, bytes(SIZE), 0o600)
            self._disk.sync_folder(self._folder)
            self._ready.extend(made)
        except (OSError, MachineError):  # the disk is full, mostly
            for path in made:
                with contextlib.suppress(OSError):
                    self._disk.unlink(path)
        finally:
            self._making = False
