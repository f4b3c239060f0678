"""Unpacking on a node: whatever does it, a frame that is bad or gives too much is refused, and the next one is taken."""

from __future__ import annotations

import random
import shutil
import signal
import sys

import pytest
import zstandard

from instar.core.errors import InputError
from instar.host import zstd

SIZES = (1, 4096, 262_144, 16_384, 262_144, 100)  # longer, and shorter again


def frame(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3, write_content_size=True).compress(data)


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size // 2) + bytes(size - size // 2)


def test_frames_one_after_the_other() -> None:
    decompress = zstd.decompressor()
    given = [decompress(frame(content(size)), size) for size in SIZES]
    assert given == [content(size) for size in SIZES]


def test_frame_that_gives_less_than_it_may() -> None:
    assert zstd.decompressor()(frame(b"few"), 262_144) == b"few"


@pytest.mark.parametrize(
    "bad", [frame(b"x")[:4], b"no frame at all", frame(content(9000))[:-9], frame(content(9000)), frame(bytes(1 << 24))],
    ids=["its first bytes", "no frame", "cut off", "too much", "a bomb"],
)  # fmt: skip
def test_bad_frame_is_refused_and_the_next_one_is_taken(bad: bytes) -> None:
    decompress = zstd.decompressor()
    for _ in range(3):
        with pytest.raises(InputError) as error:
            decompress(bad, 8192)
        assert error.value.code == "bad-frame"
        assert decompress(frame(content(8192)), 8192) == content(8192)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="no program zstd")
def test_program_does_the_same() -> None:
    decompress = zstd._program()
    assert decompress is not None
    assert decompress(frame(content(8192)), 8192) == content(8192)
    for bad in (b"no frame at all", frame(content(9000)), frame(bytes(1 << 24))):
        with pytest.raises(InputError) as error:
            decompress(bad, 8192)
        assert error.value.code == "bad-frame"


def test_no_more_is_taken_of_a_program_than_may_come() -> None:
    endless = "import sys\nwhile True: sys.stdout.buffer.write(bytes(65536))"
    status, given, _ = zstd._run([sys.executable, "-c", endless], b"", 8193)
    assert (status, given) == (-signal.SIGKILL, bytes(8193))
    words = [sys.executable, "-c", "import sys; print(sys.stdin.read()); sys.exit('why')"]
    assert zstd._run(words, b"x" * 1_000_00, 200_000) == (1, b"x" * 1_000_00 + b"\n", b"why\n")


def test_frame_with_a_flipped_bit_gives_other_bytes_or_none() -> None:
    decompress, good = zstd.decompressor(), frame(content(8192))
    for at in range(0, len(good), 97):
        bad = bytearray(good)
        bad[at] ^= 4
        try:
            assert len(decompress(bytes(bad), 8192)) <= 8192
        except InputError as error:
            assert error.code == "bad-frame"
