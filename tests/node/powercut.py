"""A disk that loses what was not synced when the power goes.

It does the real calls in a live folder, and keeps beside it what a power cut would leave:

- the data of `write_new`, `append`, `write_over` and `truncate` is durable when the call returned; cut
  inside, any part of it may be there, or zeros in its place;
- a name (created, renamed, linked, removed) is durable only after `sync_folder` of its folder; until
  then each such change is kept or lost by itself;
- `remove_tree` is a change for each name below, and may be half done;
- a file that was written past this disk (the fetched archive) is durable up to any length, and whole
  once its folder was synced.

`reboot` makes one of the folders that may be found afterwards.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from instar.host.files import Disk


class PowerCut(BaseException):
    """Nothing after this instruction was executed."""


@dataclass(frozen=True)
class Entry:
    """A file's data, a link's target, or a folder (both None)."""

    mode: int
    data: bytes | None = None
    link: str | None = None


@dataclass(frozen=True)
class Change:
    """Of the names in `folder`: `path` becomes `entry` (None: it goes), and `gone` goes with it."""

    folder: Path
    path: Path
    entry: Entry | None
    gone: Path | None = None


class PowerDisk(Disk):
    def __init__(self, root: Path, cut_at: int = -1, inside: float = 0.0, zeros: bool = False) -> None:
        """The power goes at call number `cut_at`; `inside` (0 to 1) says how far that call came."""
        self.root, self.cut_at, self.inside, self.zeros = root, cut_at, inside, zeros
        self.calls = 0
        self.durable: dict[Path, Entry] = {}
        self.pending: list[Change] = []
        self.known: set[Path] = set()  # written through this disk
        self.before: dict[Path, set[Path]] = {}  # the names that a file had, which may be what is found
        for path in sorted(root.rglob("*")):
            self.durable[path] = look(path)
            self.known.add(path)

    def _cut(self) -> bool:
        self.calls += 1
        return self.calls - 1 == self.cut_at

    def _change(self, path: Path, entry: Entry | None, gone: Path | None = None) -> None:
        for names in self.before.values():
            names.discard(path)  # it is another file's from now on
        self.before[path] = {gone, *self.before.pop(gone, ())} if gone is not None else set()
        self.pending.append(Change(path.parent, path, entry, gone))
        self.known.add(path)

    def _torn(self, data: bytes) -> bytes:
        size = round(self.inside * len(data))
        return data[:size] + (bytes(len(data) - size) if self.zeros else b"")

    def _rewrite(self, path: Path, entry: Entry) -> None:
        """New data for a file that is there already, under whichever of its names it will be found."""
        names = {path, *self.before.get(path, ())}
        self.pending = [replace(c, entry=entry) if c.path in names and c.entry else c for c in self.pending]
        self.durable |= {name: entry for name in names if name in self.durable}

    # --- data

    def write_new(self, path: Path, data: bytes, mode: int) -> None:
        cut = self._cut()
        if cut:
            data = self._torn(data)
        there = path.exists()
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        path.chmod(mode)
        if there:
            self._rewrite(path, Entry(mode, data))
        else:
            self._change(path, Entry(mode, data))
        if cut:
            raise PowerCut

    def append(self, path: Path, data: bytes, mode: int) -> None:
        cut = self._cut()
        there = path.exists()
        whole = (path.read_bytes() if there else b"") + (self._torn(data) if cut else data)
        path.write_bytes(whole)
        if there:
            self._rewrite(path, Entry(mode, whole))
        else:
            self._change(path, Entry(mode, whole))
        if cut:
            raise PowerCut

    def write_over(self, path: Path, data: bytes, offset: int) -> None:
        cut = self._cut()
        old, new = path.read_bytes(), self._torn(data) if cut else data
        assert offset + len(data) <= len(old), "it is for what the file holds already"
        whole = old[:offset] + new + old[offset + len(new) :]
        path.write_bytes(whole)
        self._rewrite(path, Entry(path.stat().st_mode & 0o7777, whole))
        if cut:
            raise PowerCut

    def truncate(self, path: Path, size: int) -> None:
        cut = self._cut()
        if not cut or self.inside > 0.5:
            os.truncate(path, size)
            self._rewrite(path, look(path))
        if cut:
            raise PowerCut

    # --- names

    def rename(self, old: Path, new: Path) -> None:
        self._name(lambda: os.rename(old, new), lambda: self._change(new, look(new), old))

    def symlink(self, target: str, path: Path) -> None:
        self._name(lambda: os.symlink(target, path), lambda: self._change(path, look(path)))

    def unlink(self, path: Path) -> None:
        self._name(lambda: os.unlink(path), lambda: self._change(path, None))

    def mkdir(self, path: Path, mode: int) -> None:
        self._name(lambda: os.mkdir(path, mode), lambda: self._change(path, look(path)))

    def _name(self, do: Callable[[], None], note: Callable[[], None]) -> None:
        cut = self._cut()
        if not cut or self.inside > 0.5:
            do()
            note()
        if cut:
            raise PowerCut

    def remove_tree(self, path: Path) -> None:
        cut = self._cut()
        os.lstat(path)
        below = sorted(path.rglob("*"), reverse=True)
        for each in [*below, path][: round(self.inside * len(below)) if cut else None]:
            each.rmdir() if each.is_dir() and not each.is_symlink() else each.unlink()
            self._change(each, None)
        if cut:
            raise PowerCut

    # --- syncs

    def sync_folder(self, path: Path) -> None:
        if self._cut():
            raise PowerCut
        for change in [c for c in self.pending if c.folder == path]:
            apply(self.durable, change)
        self.pending = [c for c in self.pending if c.folder != path]
        for foreign in path.iterdir():
            if foreign not in self.known and foreign.is_file():
                self.durable[foreign] = look(foreign)

    def sync_file(self, path: Path) -> None:
        if self._cut():
            raise PowerCut

    # --- after the cut

    def reboot(self, into: Path, keeps: Callable[[int], bool]) -> None:
        """Make `into` what may be found: `keeps(n)` says whether the n-th change that was not synced is."""
        found = dict(self.durable)
        for number, change in enumerate(self.pending):
            if keeps(number):
                apply(found, change)
        for number, path in enumerate(sorted(self.root.rglob("*"))):
            if path not in self.known and path not in found and path.is_file() and keeps(number):
                data = path.read_bytes()
                found[path] = Entry(0o600, data[: round(self.inside * len(data))])
        into.mkdir()
        for path, entry in sorted(found.items()):
            lay(into / path.relative_to(self.root), entry)
        shutil.rmtree(self.root)


def apply(names: dict[Path, Entry], change: Change) -> None:
    if change.gone is not None:
        names.pop(change.gone, None)
    if change.entry is None:
        names.pop(change.path, None)
    else:
        names[change.path] = change.entry


def lay(path: Path, entry: Entry) -> None:
    if not path.parent.is_dir():
        return  # its folder did not survive
    if entry.link is not None:
        path.symlink_to(entry.link)
    elif entry.data is None:
        path.mkdir()
    else:
        path.write_bytes(entry.data)
        path.chmod(entry.mode)


def look(path: Path) -> Entry:
    if path.is_symlink():
        return Entry(0o777, link=os.readlink(path))
    mode = path.stat().st_mode & 0o7777
    return Entry(mode) if path.is_dir() else Entry(mode, path.read_bytes())
