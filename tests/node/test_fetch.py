"""engine.fetch over a source that cuts, repeats, goes on for ever or is slow."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instar.core.errors import MachineError, ServerUnreachable, TrustError
from instar.engine.fetch import Limits, fetch
from tests.node.world import FakeClock, FakeSource

DATA = os.urandom(50_000)
SIZE = len(DATA)


def run(source: FakeSource, into: Path, limits: Limits | None = None, length: int = SIZE) -> FakeClock:
    clock = FakeClock()
    fetch(source, "/x", into, length, limits or Limits(), sleep=clock.sleep, now=clock.monotonic)
    return clock


def test_a_file_is_fetched(tmp_path: Path) -> None:
    source, told = FakeSource(DATA), []
    fetch(source, "/x", tmp_path / "f", SIZE, Limits(), told.append, sleep=lambda _: None)
    assert (tmp_path / "f").read_bytes() == DATA
    assert source.asked == [0]
    assert told == sorted(told)
    assert told[-1] == SIZE
    run(source, tmp_path / "f")
    assert source.asked == [0]  # it is there already: nobody is asked


def test_a_cut_at_every_chunk_is_resumed(tmp_path: Path) -> None:
    source = FakeSource(DATA, chunk=1000)
    source.cut_at = list(range(1000, SIZE, 1000))
    run(source, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA
    assert source.asked == list(range(0, SIZE, 1000))  # nothing was fetched twice


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, SIZE), max_size=6), st.integers(500, 20_000), st.integers(0, SIZE), st.booleans()
)
def test_cuts_anywhere_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], chunk: int, there: int, ranges: bool
) -> None:
    into = tmp_path_factory.mktemp("f") / "f"
    into.write_bytes(DATA[:there])
    source = FakeSource(DATA, chunk)
    source.cut_at, source.ranges = [c for c in cuts if c < SIZE], ranges
    run(source, into, Limits(tries=8))
    assert into.read_bytes() == DATA


def test_a_server_that_ignores_ranges_begins_anew(tmp_path: Path) -> None:
    source = FakeSource(DATA)
    source.ranges, source.cut_at = False, [30_000, 10_000]
    run(source, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA


def test_tries_without_progress_are_bounded_and_have_a_floor(tmp_path: Path) -> None:
    source = FakeSource(DATA)
    source.dead = True
    clock, limits = FakeClock(), Limits(tries=5, retry_floor_s=0.2, retry_cap_s=1.0)
    with pytest.raises(ServerUnreachable, match="0 of 50000 bytes"):
        fetch(source, "/x", tmp_path / "f", SIZE, limits, sleep=clock.sleep, now=clock.monotonic)
    assert len(source.asked) == 5
    assert 4 * 0.2 <= clock.now - 1000.0 <= 4 * 1.0


def test_a_server_that_cuts_at_the_same_place_for_ever_uses_up_the_tries(tmp_path: Path) -> None:
    source = FakeSource(DATA)
    source.ranges, source.cut_at = False, [20_000] * 50
    with pytest.raises(ServerUnreachable):
        run(source, tmp_path / "f", Limits(tries=4))
    assert len(source.asked) == 4


def test_what_came_is_kept_for_the_next_call(tmp_path: Path) -> None:
    source = FakeSource(DATA)
    source.cut_at = [20_000, 20_000]
    with pytest.raises(ServerUnreachable):
        run(source, tmp_path / "f", Limits(tries=1))
    assert (tmp_path / "f").read_bytes() == DATA[:20_000]
    source.cut_at = []
    run(source, tmp_path / "f")
    assert source.asked == [0, 20_000]


@pytest.mark.parametrize("start", [0, 20_000])
def test_an_endless_body_is_stopped_at_the_signed_length(tmp_path: Path, start: int) -> None:
    class Endless(FakeSource):
        sent = 0

        def _chunks(self, at: int):  # type: ignore[no-untyped-def]
            while True:
                self.sent += 1
                assert self.sent < 100, "it must not be read on for ever"
                yield b"x" * 4096

    (tmp_path / "f").write_bytes(DATA[:start])
    with pytest.raises(TrustError) as caught:
        run(Endless(DATA), tmp_path / "f")
    assert caught.value.code == "longer-than-signed"
    assert (tmp_path / "f").stat().st_size == 0  # the next try must not start from these bytes


def test_more_than_was_signed_on_the_disk_is_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(DATA + b"x")
    with pytest.raises(TrustError):
        run(FakeSource(DATA), tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_body_that_ends_early_without_a_word_is_a_cut(tmp_path: Path) -> None:
    short = FakeSource(DATA[:100])
    with pytest.raises(ServerUnreachable, match="ended early"):
        run(short, tmp_path / "f", Limits(tries=3))


def test_the_rate_is_kept(tmp_path: Path) -> None:
    clock = run(FakeSource(DATA, 1000), tmp_path / "f", Limits(rate_bytes_s=10_000))
    assert clock.now - 1000.0 == pytest.approx(SIZE / 10_000)


def test_a_slow_server_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    clock = FakeClock()

    class Slow(FakeSource):
        def _chunks(self, at: int):  # type: ignore[no-untyped-def]
            for chunk in super()._chunks(at):
                clock.now += 1.0
                yield chunk

    source = Slow(DATA, 10)
    with pytest.raises(ServerUnreachable) as caught:
        fetch(
            source,
            "/x",
            tmp_path / "f",
            SIZE,
            Limits(deadline_s=30.0),
            sleep=clock.sleep,
            now=clock.monotonic,
        )
    assert caught.value.code == "too-slow"
    assert clock.now - 1000.0 < 35.0


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "f").symlink_to("victim")
    with pytest.raises(MachineError):
        run(FakeSource(DATA), tmp_path / "f")
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_a_full_disk_is_named() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    # /dev/full cannot be cut to length, so any failure of the disk will do here
    with pytest.raises(MachineError) as caught:
        run(FakeSource(DATA), Path("/dev/full"))
    assert caught.value.code in ("disk-full", "disk-failed")
    assert os.strerror(errno.ENOSPC) in caught.value.text or "cannot write" in caught.value.text
