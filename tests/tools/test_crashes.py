"""The reader of records of writes, and the states that a power cut is said to leave."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.core.errors import InputError
from instar_lab.osimage import crashes
from instar_lab.osimage.blocklog import DISCARD, FLUSH, FUA, MAGIC, MARK, MARK_AT, NUMBER, Entry, Log

SECTOR = 512


def written(
    path: Path, *entries: tuple[int, int, bytes], count: int = -1, size: int = 0, magic: int = NUMBER
) -> Log:
    """A record with these (flags, sector, data); a mark's data is its text, a discard's says how much."""
    said = bytearray(
        struct.pack("<QQQI", magic, 1, len(entries) if count < 0 else count, SECTOR).ljust(SECTOR, b"\0")
    )
    for flags, sector, data in entries:
        text = data if flags & MARK else b""
        sectors = 0 if flags & MARK else len(data) // SECTOR
        said += (struct.pack("<QQQQ", sector, sectors, flags, len(text)) + text).ljust(SECTOR, b"\0")
        said += b"" if flags & (MARK | DISCARD) else data
    path.write_bytes(said[:size] if size else said)
    return Log(path)


def sectors(*letters: str) -> bytes:
    return b"".join(letter.encode() * SECTOR for letter in letters)


def entry(sector: int, *letters: str, flags: int = 0) -> Entry:
    data = sectors(*letters)
    return Entry(flags, sector * SECTOR, len(data), memoryview(data))


FLUSHED = Entry(FLUSH, 0, 0, memoryview(b""))


# --- the record


def test_entries_come_as_they_were_written(tmp_path: Path) -> None:
    mark = (MAGIC + b"7 os:poisoned").ljust(SECTOR, b"\0")
    log = written(
        tmp_path / "log", (0, 8, sectors("a", "b")), (FLUSH, 0, b""), (FUA, 3, sectors("c")),
        (DISCARD, 4, bytes(1024)), (MARK, 0, b"here"), (0, MARK_AT // SECTOR, mark), (0, 9, sectors("d")),
    )  # fmt: skip
    found = list(log.entries())
    assert [(each.flags, each.offset, each.size, bytes(each.data[:1])) for each in found] == [
        (0, 4096, 1024, b"a"), (FLUSH, 0, 0, b""), (FUA, 1536, 512, b"c"), (DISCARD, 2048, 1024, b""),
        (MARK, 0, 0, b""), (MARK, MARK_AT, 512, b"i"), (0, 4608, 512, b"d"),
    ]  # fmt: skip
    assert [each.mark for each in found if each.mark] == ["here", "os:poisoned"]


def test_record_that_is_none_or_is_cut_off_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected magic"):
        written(tmp_path / "a", magic=5)
    for size in (1, 600, 1300):
        with pytest.raises(InputError, match=r"cut off|ends (before|within) entry 0 of 1"):
            list(written(tmp_path / "b", (0, 8, sectors("a", "b")), size=size).entries())
    (tmp_path / "c").write_bytes(b"")
    with pytest.raises(InputError, match="it is empty"):
        Log(tmp_path / "c")


def test_what_the_head_does_not_count_is_not_read(tmp_path: Path) -> None:
    """QEMU counts at flushes: what came behind the last one may be half there."""
    log = written(tmp_path / "log", (0, 8, sectors("a")), (0, 9, sectors("b")), count=1)
    assert len(list(log.entries())) == 1


# --- epochs


def test_flushes_part_epochs_and_marks_part_sections() -> None:
    def mark(text: str) -> Entry:
        return Entry(MARK, 0, 0, memoryview(b""), text)

    entries = [
        entry(1, "a"), FLUSHED, mark("section update"), FLUSHED, mark("x"), entry(2, "b"), mark("y"),
        entry(3, "c", flags=FLUSH), entry(4, "d"),
    ]  # fmt: skip
    found = list(crashes.epochs(entries))
    assert [(each.number, each.mark, each.marks, len(each.writes)) for each in found] == [
        (0, "", (), 1), (1, "", ("section update",), 0), (2, "section update", ("x", "y"), 1), (3, "y", (), 2),
    ]  # fmt: skip
    assert {name: [each.number for each in within] for name, within in crashes.sections(found).items()} == {
        "": [0, 1],
        "update": [2, 3],
    }


# --- points


def states(entries: Sequence[Entry], wanted: int, size: int, folder: Path) -> set[bytes]:
    """The disks that are tried; and the one at the end is as if nothing had ever been cut."""
    path = folder / "disk"
    path.write_bytes(b"." * size * SECTOR)
    found = list(crashes.epochs(entries))
    medium = crashes.Medium(path)
    seen = set()
    for _ in crashes.replayed(medium, found, crashes.plan(found, wanted, 1)):
        seen.add(bytes(medium.view[::SECTOR]))
    end = bytearray(b"." * size * SECTOR)
    for each in entries:
        end[each.offset : each.offset + each.size] = each.data
    assert medium.view == end
    return seen


def test_every_choice_of_few_writes_is_tried(tmp_path: Path) -> None:
    entries = [entry(0, "a"), entry(1, "b"), FLUSHED, entry(2, "c")]
    assert states(entries, 1, 4, tmp_path) == {b"....", b"a...", b".b..", b"ab..", b"abc."}


def test_later_write_to_the_same_place_wins(tmp_path: Path) -> None:
    assert states([entry(0, "a"), entry(0, "b")], 1, 1, tmp_path) == {b".", b"a", b"b"}


def test_write_with_fua_is_there_once_a_later_one_is(tmp_path: Path) -> None:
    entries = [entry(0, "a", flags=FUA), entry(1, "b")]
    assert states(entries, 1, 2, tmp_path) == {b"..", b"a.", b"ab"}


def test_long_write_is_torn_between_sectors(tmp_path: Path) -> None:
    seen = states([entry(0, "a", "b", "c")], 6, 3, tmp_path)
    assert seen == {b"...", b"abc", b"a..", b"ab.", b".bc", b"..c"}


def many(count: int) -> list[Entry]:
    return [entry(2 * number, "x", "y", flags=FUA if number == 7 else 0) for number in range(count)]


@given(st.integers(0, 2**32), st.integers(1, 300))
def test_points_are_as_many_as_wanted_and_no_two_the_same(seed: int, wanted: int) -> None:
    entries = [*many(20), FLUSHED, *many(3), FLUSHED, *many(15)]
    found = list(crashes.epochs(entries))
    points = crashes.plan(found, wanted, seed)
    assert len({(point.epoch.number, point.parts) for point in points}) == len(points) >= wanted
    assert [point.name for point in points] == [point.name for point in crashes.plan(found, wanted, seed)]
    for point in points:
        numbers = [part.number for part in point.parts]
        assert numbers == sorted(set(numbers))
        if point.epoch.number != 1 and max(numbers, default=0) > 7:
            assert crashes.Part(7, 0, 2) in point.parts


def test_writes_that_nobody_judges_give_no_points() -> None:
    found = list(crashes.epochs([entry(9, "a"), FLUSHED, entry(1, "b"), entry(9, "c")]))
    points = crashes.plan(found, 2, 1, lambda write: write.offset < 9 * SECTOR)
    assert [(point.epoch.number, [part.number for part in point.parts]) for point in points] == [
        (1, []),
        (1, [0]),
    ]


def test_mirror_follows_a_part_of_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(sectors(*"abcdef"))
    medium = crashes.Medium(path)
    mirror = medium.mirror(2 * SECTOR, 2 * SECTOR, tmp_path / "mirror")
    assert mirror.read_bytes() == sectors("c", "d")
    found = list(crashes.epochs([entry(1, "x", "y", "z"), FLUSHED, entry(3, "w", "v")]))
    seen = []
    for _ in crashes.replayed(medium, found, crashes.plan(found, 2, 1)):
        assert mirror.read_bytes() == bytes(medium.view[2 * SECTOR : 4 * SECTOR])
        seen.append(mirror.read_bytes()[::SECTOR])
    assert {b"cd", b"yz", b"yw"} <= set(seen)
