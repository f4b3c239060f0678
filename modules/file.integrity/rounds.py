"""One round over the watched paths, in steps: what is there, and what of the known is gone.

A round is a walk that can stop anywhere: a stack of paths still to be looked at and at most one file that is
half read. Nothing of it is kept on the disk; a round that was cut off by the end of the process starts anew.
"""

from __future__ import annotations

import errno
import os
from pathlib import PurePosixPath
from typing import Protocol

import looking
from looking import Look, Reading
from paths import spell

TRIES = 3  # of a file that changes while it is read
AGAIN = 16  # an untouched file is read all the same in one round of so many
GONE = (errno.ENOENT, errno.ENOTDIR)


class Heard(Protocol):
    """Who is told. Each path is told of at most once in a round."""

    def found(self, path: str, look: Look, still: bool) -> None:
        """It is there. Not `still`: it changed each time it was read, and `look` has no content."""

    def refused(self, path: str, why: str) -> None:
        """It cannot be read, or it is a watched path that is not there."""

    def gone(self, path: str) -> None:
        """It was known and is not there any more. After all that was found."""


class Round:
    """`known` is read, never written. `number` chooses which untouched files are read all the same."""

    def __init__(
        self, roots: list[str], known: dict[str, Look], number: int, most: int, heard: Heard
    ) -> None:
        self._known, self._number, self._most, self._heard = known, number, most, heard
        self._unseen = set(known)
        self._blind: set[str] = set()  # folders that were not listed to the end: what is below is not gone
        self._device: dict[str, int] = {}
        self._stack = [(root, root) for root in reversed(roots)]  # path, and the root that it belongs to
        self._reading: Reading | None = None
        self._tries = 0
        self.cut = False  # a folder has more than can be looked at
        self.files = 0
        self.bytes = 0

    def step(self, entries: int, room: int) -> bool:
        """Look at no more than `entries` paths and about `room` bytes. True: the round is over."""
        while entries > 0 and room > 0:
            if self._reading is not None:
                room -= self._read(self._reading, room)
            elif self._stack:
                entries -= 1
                self._look(*self._stack.pop())
            else:
                return self._tell_gone(entries)
        return False

    def moved(self, path: str) -> None:
        """A known path was found again under another name: it is not gone."""
        self._unseen.discard(path)

    def close(self) -> None:
        """Leave it where it is."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def _look(self, path: str, root: str) -> None:
        try:
            seen = looking.of(os.lstat(path))
            if seen.dev != self._device.setdefault(root, seen.dev):
                self._blind.add(path)  # another file system is mounted here
                return
            if seen.kind == "folder":
                self._list(path, root)
            elif seen.kind == "link":
                seen = seen._replace(content=spell(os.readlink(path)))
            elif seen.kind == "file":
                if self._to_be_read(path, seen):
                    self._reading, self._tries = Reading(path), 1
                    self._unseen.discard(path)
                    return
                seen = self._known[path]
        except OSError as error:
            self._failed(path, error, path == root)
            return
        self._unseen.discard(path)
        self.files += 1
        self._heard.found(path, seen, True)

    def _list(self, path: str, root: str) -> None:
        with os.scandir(path) as entries:
            for entry in entries:
                if len(self._stack) >= self._most:
                    self.cut = True
                    self._blind.add(path)
                    return
                self._stack.append((entry.path, root))

    def _to_be_read(self, path: str, seen: Look) -> bool:
        """Untouched files have their turn all the same, spread over the rounds by their paths."""
        known = self._known.get(path)
        if known is None or not seen.untouched(known):
            return True
        if not known.content:
            return seen.size <= looking.LARGEST  # it did not stand still the last time
        return (sum(os.fsencode(path)) + self._number) % AGAIN == 0

    def _read(self, reading: Reading, room: int) -> int:
        """Go on with the file that is half read; returns how much of `room` that took."""
        try:
            look, done, still = reading.more(room)
            self.bytes += done
            if look is None:
                return done
            self.close()
            if not still and self._tries < TRIES:
                self._tries += 1
                self._reading = Reading(reading.path)
                return done + 1
        except OSError as error:
            self.close()
            self._failed(reading.path, error, False)
            return 1
        self.files += 1
        self._heard.found(reading.path, look if still else look._replace(content=""), still)
        return done + 1

    def _failed(self, path: str, error: OSError, root: bool) -> None:
        if error.errno in GONE:
            if path in self._known:
                self._unseen.add(path)
            elif root:
                self._heard.refused(path, "it is not there")
            return
        self._blind.add(path)
        self._heard.refused(path, error.strerror or type(error).__name__)

    def _tell_gone(self, entries: int) -> bool:
        while self._unseen and entries > 0:
            path = self._unseen.pop()
            entries -= 1
            if not self._unsure(path):
                self._heard.gone(path)
        return not self._unseen

    def _unsure(self, path: str) -> bool:
        """Whether it lies where nobody could look."""
        if not self._blind:
            return False
        return path in self._blind or any(str(above) in self._blind for above in PurePosixPath(path).parents)
