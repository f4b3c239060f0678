"""EFI boot entries: our bytes are the specification's, and nobody's bytes break the reader."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.core.errors import InputError
from instar.host.boot.loadoption import END, HardDrive, LoadOption, decode, encode, order, order_bytes

DRIVES = st.builds(
    HardDrive, st.integers(1, 128), st.integers(0, 2**40), st.integers(1, 2**40), st.binary(min_size=16, max_size=16)
)  # fmt: skip
WORDS = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF), min_size=1, max_size=60)
OPTIONS = st.builds(LoadOption, WORDS, DRIVES, WORDS, st.booleans(), st.binary(max_size=64))


def test_entry_is_laid_out_as_the_specification_says() -> None:
    drive = HardDrive(1, 2048, 4096, bytes(range(16)))
    data = encode(LoadOption("X", drive, "\\e"))
    node = struct.pack("<BBHIQQ", 4, 1, 42, 1, 2048, 4096) + bytes(range(16)) + b"\x02\x02"
    path = b"\x04\x04\x0a\x00\\\0e\0\0\0"
    assert data == struct.pack("<IH", 1, 42 + 10 + 4) + b"X\0\0\0" + node + path + END


@given(OPTIONS)
def test_what_is_written_can_be_read(option: LoadOption) -> None:
    assert decode(encode(option)) == option


@given(OPTIONS, st.integers(0, 200))
def test_entry_that_is_cut_off_is_refused_or_read_and_never_breaks(option: LoadOption, keep: int) -> None:
    data = encode(option)
    cut = data[: min(keep, len(data) - len(option.data) - 1)]
    with pytest.raises(InputError, match="cannot read a boot entry"):
        decode(cut)


@given(st.binary(max_size=300))
def test_strange_bytes_break_nothing(data: bytes) -> None:
    try:
        decode(data)
    except InputError as error:
        assert error.code == "bad-load-option"


def test_entry_of_something_else_has_no_path() -> None:
    network = struct.pack("<BBH", 3, 11, 37) + bytes(33) + END
    data = struct.pack("<IH", 1, len(network)) + "net\0".encode("utf-16-le") + network
    assert decode(data) == LoadOption("net", None, "")


def test_order_is_a_row_of_numbers() -> None:
    assert order(order_bytes([3, 0, 65535])) == [3, 0, 65535]
    assert order(b"\x01\x00\x07") == [1]  # an odd byte is no number


def test_entry_without_a_drive_cannot_be_written() -> None:
    with pytest.raises(InputError, match="expected a partition"):
        encode(LoadOption("x", None, "\\a"))
