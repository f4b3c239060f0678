"""The states in which a power cut could have left a disk, from a record of the writes to it (blocklog.py).

What is on the disk for sure at a moment: all that came before the last flush, and every later write with FUA.
Of the rest any part may be there, in any choice, torn between two sectors. The time between two flushes is an
*epoch*; a *point* is one epoch's writes as far as they had arrived:

    all of a prefix of them; any choice among a prefix; a prefix whose last write is torn

A write is on record when it is handed to the disk, so one that was still on its way at a flush counts as covered
by it: Linux waits for its writes before it flushes. A discard counts as a write of zeros.

Points cost little: the disk is kept up to date flush by flush, and a point's writes are put on it and taken back.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from instar_lab.osimage.blocklog import DISCARD, FLUSH, FUA, MARK, SECTOR, Entry

SECTION = "section "
MOST_ROUNDS = 12
PIECE = 64 << 10
EXHAUSTIVE = 4  # up to so many writes in an epoch, every choice among them is tried


class Write(NamedTuple):
    offset: int
    data: memoryview
    durable: bool = False  # FUA: there for sure once it is done


class Epoch(NamedTuple):
    """`number` counts flushes. `mark` is the last one before it; `marks` are those within it."""

    number: int
    mark: str
    marks: tuple[str, ...]
    writes: tuple[Write, ...]


class Part(NamedTuple):
    """Sectors `first` to before `end` of the write `number` of an epoch."""

    number: int
    first: int
    end: int


class Point(NamedTuple):
    epoch: Epoch
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """For people: says how to find it again."""
        said = ",".join(f"{part.number}:{part.first}-{part.end}" for part in self.parts)
        return f"epoch {self.epoch.number} after {self.epoch.mark or 'the start'} [{said}]"

    def writes(self) -> list[tuple[int, memoryview]]:
        found = []
        for part in self.parts:
            write = self.epoch.writes[part.number]
            first = part.first * SECTOR
            found.append((write.offset + first, write.data[first : part.end * SECTOR]))
        return found


def epochs(entries: Iterable[Entry]) -> Iterator[Epoch]:
    """Cut a record at its flushes. A flush with data comes before its data."""
    number, before, marks, writes = 0, "", list[str](), list[Write]()
    for entry in entries:
        if entry.flags & FLUSH:
            yield Epoch(number, before, tuple(marks), tuple(writes))
            number, before, marks, writes = number + 1, [before, *marks][-1], [], []
        if entry.flags & MARK:
            marks.append(entry.mark)
        if entry.size:
            data = memoryview(bytes(entry.size)) if entry.flags & DISCARD else entry.data
            writes.append(Write(entry.offset, data, bool(entry.flags & FUA)))
    yield Epoch(number, before, tuple(marks), tuple(writes))


def sections(found: Iterable[Epoch]) -> dict[str, list[Epoch]]:
    """Epochs by the section that they begin in: that of the last mark `section NAME`, '' before the first one."""
    parted, name = dict[str, list[Epoch]](), ""
    for epoch in found:
        parted.setdefault(name, []).append(epoch)
        for mark in epoch.marks:
            if mark.startswith(SECTION):
                name = mark.removeprefix(SECTION)
    return parted


# --- choosing


def plan(
    found: Iterable[Epoch], wanted: int, seed: int, judged: Callable[[Write], bool] = lambda _: True
) -> list[Point]:
    """At least `wanted` points, no two the same, in order; fewer when the record has no more to give.

    Only writes that are `judged` are chosen among, and epochs without one give no point: nothing that anybody
    looks at changes there. Every epoch gives its share; small ones give all they have.
    """
    chosen = [(epoch, [i for i, write in enumerate(epoch.writes) if judged(write)]) for epoch in found]
    chosen = [(epoch, indexes) for epoch, indexes in chosen if indexes]
    if not chosen:
        return []
    share, points = -(-wanted // len(chosen)), list[Point]()
    for _ in range(MOST_ROUNDS):
        points = []
        for epoch, indexes in chosen:
            points += _points(epoch, indexes, share, random.Random(f"{seed}:{epoch.number}"))
        if len(points) >= wanted:
            break
        share = share * 3 // 2 + 1
    return points


def _points(epoch: Epoch, indexes: list[int], share: int, chance: random.Random) -> list[Point]:
    """Up to `share` different ones of an epoch, more when every choice is tried."""
    found = dict.fromkeys(_all(epoch, indexes) if len(indexes) <= EXHAUSTIVE else ())
    found |= dict.fromkeys([(), _whole(epoch, indexes)])
    for way in itertools.islice(itertools.cycle((_prefix, _choice, _torn)), share * 4):
        if len(found) >= share:
            break
        found.setdefault(way(epoch, indexes, chance))
    return [Point(epoch, parts) for parts in found]


def _all(epoch: Epoch, indexes: list[int]) -> list[tuple[Part, ...]]:
    found = []
    for picked in itertools.product((False, True), repeat=len(indexes)):
        there = [index for index, yes in zip(indexes, picked, strict=True) if yes]
        last = max(there, default=-1)
        if all(index in there for index in indexes if index < last and epoch.writes[index].durable):
            found.append(_whole(epoch, there))
    return found


def _whole(epoch: Epoch, indexes: Iterable[int]) -> tuple[Part, ...]:
    return tuple(Part(index, 0, _sectors(epoch, index)) for index in indexes)


def _sectors(epoch: Epoch, index: int) -> int:
    return len(epoch.writes[index].data) // SECTOR


def _prefix(epoch: Epoch, indexes: list[int], chance: random.Random) -> tuple[Part, ...]:
    return _whole(epoch, indexes[: chance.randint(0, len(indexes))])


def _choice(epoch: Epoch, indexes: list[int], chance: random.Random) -> tuple[Part, ...]:
    """Any of a prefix: often of the whole epoch, since its last writes are those that make things valid."""
    upto = len(indexes) if chance.random() < 0.5 else chance.randint(0, len(indexes))
    share = chance.choice((0.1, 0.5, 0.9))
    kept = [i for i in indexes[:upto] if epoch.writes[i].durable or chance.random() < share]
    return _whole(epoch, kept)


def _torn(epoch: Epoch, indexes: list[int], chance: random.Random) -> tuple[Part, ...]:
    """A choice, one write of which has arrived with its first sectors or its last ones only."""
    parts = list(_choice(epoch, indexes, chance))
    long = [at for at, part in enumerate(parts) if part.end > 1 and not epoch.writes[part.number].durable]
    if long:
        at = chance.choice(long)
        cut = chance.randint(1, parts[at].end - 1)
        head = chance.random() < 0.5
        parts[at] = parts[at]._replace(end=cut) if head else parts[at]._replace(first=cut)
    return tuple(parts)


# --- putting on a disk


class Medium:
    """A disk's file, mapped. A part of it can be mirrored into a file of its own, for programs that take a file."""

    def __init__(self, path: Path) -> None:
        self._map = _mapped(path)
        self._mirrors: list[tuple[int, mmap.mmap]] = []
        self.view = memoryview(self._map)

    def mirror(self, offset: int, size: int, path: Path) -> Path:
        """Keep `path` the same as these bytes from now on."""
        with path.open("wb") as file:
            file.truncate(size)
            for at in range(0, size, PIECE):
                data = bytes(self.view[offset + at : offset + min(at + PIECE, size)])
                if data.strip(b"\0"):  # it stays sparse
                    file.seek(at)
                    file.write(data)
        self._mirrors.append((offset, _mapped(path)))
        return path

    def put(self, writes: Iterable[tuple[int, bytes | memoryview]]) -> None:
        for offset, data in writes:
            self._map[offset : offset + len(data)] = data
            for start, mirror in self._mirrors:
                low, high = max(offset, start), min(offset + len(data), start + len(mirror))
                if low < high:
                    mirror[low - start : high - start] = data[low - offset : high - offset]

    @contextlib.contextmanager
    def at(self, point: Point) -> Iterator[None]:
        """The disk as it is at `point` of the epoch whose predecessors are on it; taken back at the end."""
        writes = point.writes()
        old = [(offset, self._map[offset : offset + len(data)]) for offset, data in writes]
        self.put(writes)
        try:
            yield
        finally:
            self.put(reversed(old))

    def advance(self, epoch: Epoch) -> None:
        self.put((write.offset, write.data) for write in epoch.writes)


def replayed(medium: Medium, found: Iterable[Epoch], points: Iterable[Point]) -> Iterator[Point]:
    """Go through the record once; the medium is in the state of the point that was yielded, until the next.

    The caller goes on to the end, so that the medium then is as the machine left its disk.
    """
    due: dict[int, list[Point]] = {}
    for point in points:
        due.setdefault(point.epoch.number, []).append(point)
    for epoch in found:
        for point in due.get(epoch.number, ()):
            with medium.at(point):
                yield point
        medium.advance(epoch)


def _mapped(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)
