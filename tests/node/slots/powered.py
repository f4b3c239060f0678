"""A machine whose power goes: what its disk, its EFI system partition and its firmware have kept then.

- The state folder is as `tests.node.powercut` says.
- The slots, and any file that is written through `create` and `write_at`: each write that was not synced is kept or
  lost by itself, the last one in part.
- The EFI system partition is vfat: a file that was renamed has no bytes on the disk until it was synced by its new
  name, whatever was synced before; and one that goes loses its content at once unless it is held open, while its
  name may come back (both seen with Linux 6.1).
- A variable of the firmware is written at once, or not at all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from instar.host.files import Disk
from tests.node.powercut import Entry, PowerCut, PowerDisk, look
from tests.node.slots.images import Image
from tests.node.slots.system import System


class MachineDisk(PowerDisk):
    """`root` is the folder of a `System`."""

    def __init__(self, root: Path, cut_at: int = -1, inside: float = 0.0, zeros: bool = False) -> None:
        super().__init__(root, cut_at, inside, zeros)
        self._esp, self._efivars = root / "esp", root / "efivars"
        self._cached: dict[Path, list[tuple[int, bytes]]] = {}
        self._unsized = set[Path]()  # on vfat: renamed, and not synced by that name
        self._dead = False

    @property
    def was_cut(self) -> bool:
        return self._dead

    def _cut(self) -> bool:
        if self._dead:  # another thread's call
            raise PowerCut
        self._dead = super()._cut()
        return self._dead

    # --- files and devices that stay open

    def create(self, path: Path, mode: int) -> int:
        cut = self._cut()
        if cut and self.inside <= 0.5:
            raise PowerCut
        there = path.exists()
        fd = Disk.create(self, path, mode)
        if there:
            self._rewrite(path, Entry(mode, b""))
        else:
            self._change(path, Entry(mode, b""))
        if cut:
            os.close(fd)
            raise PowerCut
        return fd

    def write_at(self, fd: int, data: bytes, offset: int) -> None:
        cut = self._cut()
        done = bytes(data)[: round(self.inside * len(data))] if cut else bytes(data)
        Disk.write_at(self, fd, done, offset)
        self._cached.setdefault(_path(fd), []).append((offset, done))
        if cut:
            raise PowerCut

    def sync_open(self, fd: int) -> None:
        if self._cut():
            raise PowerCut
        path = _path(fd)
        self._cached.pop(path, None)
        self._rewrite(path, look(path))

    # --- the firmware

    def write_variable(self, path: Path, data: bytes) -> None:
        cut = self._cut()
        if not cut or self.inside > 0.5:
            Disk.write_variable(self, path, data)
            self.durable[path] = look(path)
            self.known.add(path)
        if cut:
            raise PowerCut

    def unlink(self, path: Path) -> None:
        with self._freeing(path):
            super().unlink(path)
        if path.parent == self._efivars:
            self.pending = [change for change in self.pending if change.path != path]
            self.durable.pop(path, None)

    # --- vfat

    def rename(self, old: Path, new: Path) -> None:
        try:
            with self._freeing(new):
                super().rename(old, new)
        finally:
            if new.is_relative_to(self._esp) and not old.exists():
                self._unsized.discard(old)
                self._unsized.add(new)

    @contextlib.contextmanager
    def _freeing(self, path: Path) -> Iterator[None]:
        """Linux frees the clusters of a file that goes at once, unless somebody has it open."""
        before = path.stat().st_ino if path.is_relative_to(self._esp) and path.exists() else 0
        try:
            yield
        finally:
            gone = before and (not path.exists() or path.stat().st_ino != before)
            if gone and before not in _open_files() and path in self.durable:
                self.durable[path] = Entry(self.durable[path].mode, b"")

    def sync_file(self, path: Path) -> None:
        super().sync_file(path)
        self._unsized.discard(path)
        if path in self.durable:
            self.durable[path] = look(path)

    def sync_folder(self, path: Path) -> None:
        whole = self.pending
        self.pending = self._as_vfat()
        try:
            super().sync_folder(path)
        except PowerCut:
            self.pending = whole
            raise
        self.pending = [change for change in whole if change.folder != path]

    def _as_vfat(self) -> list:  # type: ignore[type-arg]
        return [
            replace(change, entry=Entry(change.entry.mode, b""))
            if change.path in self._unsized and change.entry is not None else change
            for change in self.pending
        ]  # fmt: skip

    # --- up and down

    def settle(self) -> None:
        """The machine went down in good order, and its firmware has started something meanwhile."""
        found = [path for path in sorted(self.root.rglob("*")) if path.is_file() or path.is_dir()]
        self.durable = {path: look(path) for path in found}
        self.known |= set(found)
        self.pending, self._cached, self._unsized = [], {}, set()

    def reboot(self, into: Path, keeps: Callable[[int], bool]) -> None:
        for path, writes in self._cached.items():
            self._rewrite(path, self._cached_kept(path, writes, keeps))
        self.pending = self._as_vfat()
        super().reboot(into, keeps)

    def _cached_kept(
        self, path: Path, writes: list[tuple[int, bytes]], keeps: Callable[[int], bool]
    ) -> Entry:
        old = self.durable.get(path) or next(each.entry for each in self.pending[::-1] if each.path == path)
        assert old is not None
        data = bytearray(old.data or b"")
        for number, (offset, piece) in enumerate(writes):
            if keeps(number):
                data.extend(bytes(max(0, offset + len(piece) - len(data))))
                data[offset : offset + len(piece)] = piece
        return Entry(old.mode, bytes(data))


def _open_files() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(os.fstat(int(name)).st_ino)
    return found


def _path(fd: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{fd}"))


class PoweredSystem(System):
    """On a disk that may lose what was not synced."""

    def after_down(self) -> None:
        super().after_down()
        if isinstance(self.disk, MachineDisk):
            self.disk.settle()


def powered(system: System, disk: Disk, folder: Path | None = None) -> PoweredSystem:
    """The same machine, faults, time and all, on another disk, or as it was found in another folder."""
    system.close()
    old, new = system.images[0], system.new
    made = PoweredSystem(
        folder or system.folder, old, new, system.backend, disk, True, system.slots["a"].size
    )
    names = (
        "images",
        "clock",
        "panics",
        "broken",
        "panics_cold",
        "broken_cold",
        "running",
        "booted",
        "downs",
    )
    for name in names:
        setattr(made, name, getattr(system, name))
    return made


def small(folder: Path, version: str, seed: int) -> Image:
    return Image(folder, version, seed, 48 << 10)


SMALL = 64 << 10  # bytes of a slot for it
