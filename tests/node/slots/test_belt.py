"""A belt, and writing behind: in order, synced on the way, bounded; what goes wrong in the thread is told, and no
thread is left."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from instar.host.files import Disk
from instar.targets.slots.belt import HELD, Behind

PIECE = 64 << 10
WITHIN_S = 30.0


class Told(Disk):
    """Notes every call; fails at write number `at`; syncs when it is allowed to."""

    def __init__(self, at: int = -1, fault: BaseException | None = None) -> None:
        self.calls: list[str] = []
        self._at, self._fault = at, fault
        self.may_sync = threading.Event()
        self.may_sync.set()

    def write_at(self, fd: int, data: bytes, offset: int) -> None:
        if self._fault is not None and self.calls.count("write") == self._at:
            raise self._fault
        self.calls.append("write")
        super().write_at(fd, data, offset)

    def sync_open(self, fd: int) -> None:
        assert self.may_sync.wait(WITHIN_S)
        self.calls.append("sync")
        super().sync_open(fd)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    number = os.open(tmp_path / "slot", os.O_RDWR | os.O_CREAT)
    yield number
    os.close(number)
    assert [each.name for each in threading.enumerate() if each.name == "slot-writer"] == []


def pieces(count: int) -> list[bytes]:
    return [bytes((number,)) * PIECE for number in range(count)]


def test_all_is_written_and_synced_when_it_is_finished(fd: int) -> None:
    disk = Told()
    with Behind(disk, fd, PIECE, 3 * PIECE) as behind:
        assert behind.safe == PIECE
        for number, piece in enumerate(pieces(8), 1):
            behind.put((number * PIECE, piece), PIECE)
        behind.finish()
        assert behind.safe == 9 * PIECE
    assert os.pread(fd, 9 * PIECE, 0) == bytes(PIECE) + b"".join(pieces(8))
    assert disk.calls == [*["write"] * 3, "sync", *["write"] * 3, "sync", *["write"] * 2, "sync"]


def test_nothing_is_safe_before_it_is_synced(fd: int) -> None:
    disk = Told()
    disk.may_sync.clear()
    with Behind(disk, fd, 0, PIECE) as behind:
        for number, piece in enumerate(pieces(4)):
            behind.put((number * PIECE, piece), PIECE)
        assert behind.safe == 0
        disk.may_sync.set()
        behind.finish()
        assert behind.safe == 4 * PIECE


def test_who_hands_over_goes_on_while_the_disk_syncs_until_too_much_waits(fd: int) -> None:
    disk = Told()
    disk.may_sync.clear()
    room, put = HELD // PIECE, threading.Semaphore(0)
    with Behind(disk, fd, 0, PIECE) as behind:

        def hand_over() -> None:
            for number in range(4 * room):
                behind.put((number * PIECE, b"y" * PIECE), PIECE)
                put.release()

        hands = threading.Thread(target=hand_over)
        hands.start()
        for _ in range(room):  # none of them has been synced: the first one still is at it
            assert put.acquire(timeout=WITHIN_S)
        more = 0
        while put.acquire(timeout=0.4):
            more += 1
        assert more <= 1  # the one in work may have made room for one
        assert "sync" not in disk.calls
        disk.may_sync.set()
        hands.join(WITHIN_S)
        behind.finish()
        assert behind.safe == 4 * room * PIECE


class Cut(BaseException):
    """The power."""


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), Cut()])
@pytest.mark.parametrize("at", [0, 3, 9])
def test_what_goes_wrong_is_raised_where_the_chunks_come_from(fd: int, at: int, fault: BaseException) -> None:
    disk = Told(at, fault)
    with pytest.raises(type(fault)), Behind(disk, fd, 0, 2 * PIECE) as behind:  # noqa: PT012
        for number in range(200):  # more than may wait: it must not wait for ever either
            behind.put((number * PIECE, b"z" * PIECE), PIECE)
        behind.finish()
    assert behind.safe <= at * PIECE


def test_what_waits_is_thrown_away_when_it_is_left_early(fd: int) -> None:
    disk = Told()
    disk.may_sync.clear()
    with pytest.raises(Cut), Behind(disk, fd, 0, PIECE) as behind:  # noqa: PT012
        for number in range(6):
            behind.put((number * PIECE, b"z" * PIECE), PIECE)
        threading.Timer(1.0, disk.may_sync.set).start()
        raise Cut
    assert disk.calls.count("write") < 6
