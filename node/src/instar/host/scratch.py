"""Folders for one run each, removed after it whatever it has put there.

A tree of any depth and size is removed without recursion and without a long hold of the event loop:
each folder below is moved up beside the others first, so that no path grows long.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

AT_ONCE = 200  # names that are removed before others get a turn


class Scratch:
    """Makes and removes folders below `folder`, which nobody else uses."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._made = False

    async def make(self) -> Path:
        """A new empty folder. Raises OSError. The first call removes what an agent before us left."""
        if not self._made:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in os.listdir(self._folder):
                await self.drop(self._folder / name)
            self._made = True
        self._number += 1
        path = self._folder / f"{os.getpid()}-{self._number}"
        path.mkdir(0o700)
        return path

    async def drop(self, path: Path) -> None:
        """Remove what `make` made. What cannot be removed stays for the next start."""
        try:
            os.rmdir(path)
        except NotADirectoryError:
            with contextlib.suppress(OSError):
                os.unlink(path)
        except OSError:  # it is not empty, mostly
            await self._empty(path)

    async def _empty(self, path: Path) -> None:
        folders, count = [path], 0
        while folders:
            folder = folders.pop()
            with contextlib.suppress(OSError):
                os.chmod(folder, 0o700, follow_symlinks=False)
            with contextlib.suppress(OSError):
                for name in os.listdir(folder):
                    folders += self._remove(folder / name)
                    count += 1
                    if count % AT_ONCE == 0:
                        await asyncio.sleep(0)
                os.rmdir(folder)

    def _remove(self, path: Path) -> list[Path]:
        """Remove a file; a folder is moved up, and returned to be emptied."""
        with contextlib.suppress(OSError):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
                return []
            self._number += 1
            moved = self._folder / f"{os.getpid()}-{self._number}"
            path.rename(moved)
            return [moved]
        return []
