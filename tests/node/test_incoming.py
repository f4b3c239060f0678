"""Parcels that come in blocks: what both sides agree on, what a cut leaves, what ends one."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.core.errors import InputError, InstarError, MachineError, TrustError
from instar.host.blocks import SYNC_EVERY, Terms, agree, decode_block
from instar.host.files import Disk
from instar.host.incoming import Incoming
from instar.host.parcel import Limits
from instar.wire.messages import UpdateOffer
from tests.node.parcels import DIGEST, blocks, offer, parcel
from tests.node.receiving import ARCHIVE, SHA384, WHOLE, Booted, incoming, names, receive

__all__ = ["incoming"]  # a fixture


@pytest.mark.parametrize("block", [1024, 4096, 131_072, 50_000])
def test_in_blocks_to_the_whole(incoming: Incoming, block: int) -> None:
    receiving = incoming.open(offer(WHOLE, block=block))
    assert (receiving.blocks, receiving.total) == (0, -(-len(WHOLE) // block))
    assert names(incoming) == []
    receive(receiving, WHOLE)
    assert receiving.blocks == receiving.total
    found = receiving.end(SHA384)
    assert found.archive.read_bytes() == ARCHIVE
    assert names(incoming) == [SHA384[:24]]
    assert (found.folder / "complete").read_text() == SHA384
    assert incoming.complete() == [found]
    assert incoming.find("agent", DIGEST) == incoming.find("updater", DIGEST) == found
    assert incoming.find("agent", "cd" * 48) is incoming.find("module/x", DIGEST) is None
    assert incoming.of_sha384(SHA384) == found
    assert incoming.of_sha384(SHA384[:24] + "0" * 72) is None


def test_one_that_is_here_need_not_come_again(incoming: Incoming) -> None:
    first = incoming.store(io.BytesIO(WHOLE), SHA384)
    again = incoming.open(offer(WHOLE))
    assert again.blocks == again.total
    assert again.end(SHA384) == first
    assert incoming.store(io.BytesIO(WHOLE), SHA384) == first


@pytest.mark.parametrize("left", [0, 1, 3, 12])
def test_goes_on_after_a_cut(incoming: Incoming, left: int) -> None:
    receiving = incoming.open(offer(WHOLE))
    receive(receiving, WHOLE, left)
    receiving.close()
    with contextless(incoming.part(SHA384)) as part:
        part.write(b"half a block")  # as a kill leaves it
    again = incoming.open(offer(WHOLE, id="u-2"))
    assert again.blocks == left
    receive(again, WHOLE)
    assert again.end(SHA384).archive.read_bytes() == ARCHIVE


def contextless(path: Path) -> Any:
    """`path` to append to, where it is there at all."""
    return path.open("ab") if path.exists() else io.BytesIO()


def test_goes_on_with_blocks_of_another_size(incoming: Incoming) -> None:
    receiving = incoming.open(offer(WHOLE, block=4096))
    receive(receiving, WHOLE, 5)
    receiving.close()
    again = incoming.open(offer(WHOLE, block=8192))
    assert again.blocks == 2
    receive(again, WHOLE)
    assert again.end(SHA384).length == len(ARCHIVE)


def test_all_blocks_but_no_end(incoming: Incoming) -> None:
    receiving = incoming.open(offer(WHOLE))
    receive(receiving, WHOLE)
    receiving.close()
    again = incoming.open(offer(WHOLE))
    assert again.blocks == again.total
    assert again.end(SHA384).archive.read_bytes() == ARCHIVE


def test_after_a_power_cut_only_what_was_synced_counts(incoming: Incoming) -> None:
    archive = os.urandom(6 << 20)
    data = parcel(archive)
    wanted = offer(data, block=1 << 16)
    receiving = incoming.open(wanted)
    receive(receiving, data, 70)  # synced after the 64th: every 4 MiB
    receiving.close()
    after = Incoming(incoming.folder, clock=Booted("boot-2"))
    assert after.open(wanted).blocks == SYNC_EVERY >> 16 == 64
    assert Incoming(incoming.folder, clock=Booted()).open(wanted).blocks == 70
    again = after.open(wanted)
    receive(again, data)
    assert again.end(wanted.sha384).archive.read_bytes() == archive


@pytest.mark.parametrize("harm", ["longer", "record", "no-record", "other-length", "link", "folder"])
def test_a_part_of_no_use_is_begun_anew(incoming: Incoming, harm: str, tmp_path: Path) -> None:
    receiving = incoming.open(offer(WHOLE))
    receive(receiving, WHOLE, 5)
    receiving.close()
    part, note = incoming.part(SHA384), incoming.folder / f"{SHA384[:24]}.offer.json"
    if harm == "longer":
        part.write_bytes(WHOLE + b"x")
    elif harm == "record":
        note.write_bytes(b'{"sha384": [')
    elif harm == "no-record":
        note.unlink()
    elif harm == "other-length":
        note.write_text(json.dumps({**json.loads(note.read_text()), "length": 1}))
    else:
        part.unlink()
        part.symlink_to(tmp_path / "elsewhere") if harm == "link" else part.mkdir()
    again = incoming.open(offer(WHOLE))
    assert again.blocks == 0
    assert names(incoming) == []
    receive(again, WHOLE)
    assert again.end(SHA384).archive.read_bytes() == ARCHIVE
    assert not (tmp_path / "elsewhere").exists()


def test_a_damaged_part_is_found_out(incoming: Incoming) -> None:
    receiving = incoming.open(offer(WHOLE))
    receive(receiving, WHOLE, 6)
    receiving.close()
    with incoming.part(SHA384).open("r+b") as part:
        part.seek(100)
        part.write(b"harm")
    again = incoming.open(offer(WHOLE))
    assert again.blocks == 6
    receive(again, WHOLE)
    with pytest.raises(TrustError) as caught:
        again.end(SHA384)
    assert caught.value.code == "altered-parcel"
    assert names(incoming) == []
    assert incoming.open(offer(WHOLE)).blocks == 0


@pytest.mark.parametrize(
    ("number", "size", "code"),
    [(4, 4096, "wrong-block"), (2, 4096, "wrong-block"), (-1, 4096, "wrong-block"), (3, 4095, "wrong-block-size"),
     (3, 4097, "wrong-block-size"), (3, 0, "wrong-block-size"), (1 << 40, 4096, "wrong-block")],
)  # fmt: skip
def test_a_wrong_block_ends_it(incoming: Incoming, number: int, size: int, code: str) -> None:
    receiving = incoming.open(offer(WHOLE))
    receive(receiving, WHOLE, 3)
    with pytest.raises(InputError) as caught:
        receiving.block(number, bytes(size))
    assert caught.value.code == code
    assert names(incoming) == []


def test_a_block_past_the_last(incoming: Incoming) -> None:
    receiving = incoming.open(offer(WHOLE))
    receive(receiving, WHOLE)
    with pytest.raises(InputError, match="expected block 15 of 15"):
        receiving.block(receiving.total, b"x" * 4096)


def test_ends_too_early(incoming: Incoming) -> None:
    receiving = incoming.open(offer(WHOLE))
    receive(receiving, WHOLE, 3)
    with pytest.raises(InputError) as caught:
        receiving.end(SHA384)
    assert caught.value.code == "incomplete-parcel"
    assert names(incoming) == []


@pytest.mark.parametrize(
    "changes",
    [{"digest": "cd" * 48}, {"version": "1.2.0"}, {"target": "node/other.tar.gz"}, {"line": "recovery"}],
)
def test_must_be_what_was_offered(incoming: Incoming, changes: dict[str, Any]) -> None:
    receiving = incoming.open(offer(WHOLE, **changes))
    receive(receiving, WHOLE)
    with pytest.raises(TrustError) as caught:
        receiving.end(SHA384)
    assert caught.value.code == "wrong-parcel"
    assert names(incoming) == []


def test_another_end_than_was_offered(incoming: Incoming) -> None:
    receiving = incoming.open(offer(WHOLE))
    receive(receiving, WHOLE)
    with pytest.raises(TrustError) as caught:
        receiving.end("0" * 96)
    assert caught.value.code == "altered-parcel"
    assert names(incoming) == []


@pytest.mark.parametrize(
    "changes",
    [{"line": "module/x"}, {"line": ""}, {"sha384": "ab"}, {"sha384": "../" * 32}, {"length": 0}, {"length": -1},
     {"length": 1 << 40}, {"digest": "x"}, {"version": "1"}],
)  # fmt: skip
def test_offers_of_no_use(incoming: Incoming, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        incoming.open(offer(WHOLE, **changes))
    assert caught.value.code == "bad-offer"
    assert not incoming.folder.exists()


def test_no_space_is_told_before_anything_is_written(incoming: Incoming) -> None:
    free = os.statvfs(incoming.folder.parent).f_bavail * os.statvfs(incoming.folder.parent).f_frsize
    huge = Incoming(incoming.folder, limits=Limits(archive=1 << 60))
    with pytest.raises(MachineError) as caught:
        huge.open(offer(WHOLE, length=free))
    assert caught.value.code == "no-space"
    assert names(incoming) == []


class FullDisk(Disk):
    """Takes so many new files."""

    def __init__(self, files: int) -> None:
        self.files = files

    def write_new(self, path: Path, data: bytes, mode: int) -> None:
        self.files -= 1
        if self.files < 0:
            raise OSError(errno.ENOSPC, "full", str(path))
        super().write_new(path, data, mode)


@pytest.mark.parametrize("files", range(3))
def test_a_disk_that_fills_up(tmp_path: Path, files: int) -> None:
    incoming = Incoming(tmp_path / "incoming", FullDisk(files), Booted())
    receiving = incoming.open(offer(WHOLE))

    def whole() -> None:
        receive(receiving, WHOLE)
        receiving.end(SHA384)

    with pytest.raises(MachineError) as caught:
        whole()
    assert caught.value.code == "disk-full"
    assert names(incoming) == []


KILLED = """
import hashlib, os, signal, sys
from pathlib import Path
from instar.host import points
from instar.host.incoming import Incoming
from tests.node.parcels import blocks, offer
data, place = Path(sys.argv[1]).read_bytes(), sys.argv[3]
seen = 0
def reached(name):
    global seen
    seen += name == place
    if seen == int(sys.argv[4]): os.kill(os.getpid(), signal.SIGKILL)
points.listener = reached
receiving = Incoming(Path(sys.argv[2])).open(offer(data))
for n, block in list(enumerate(blocks(data, 4096)))[receiving.blocks:]: receiving.block(n, block)
receiving.end(hashlib.sha384(data).hexdigest())
"""


@pytest.mark.parametrize(
    ("place", "count"),
    [("incoming:block", 1), ("incoming:block", 7), ("incoming:block", 15), ("incoming:checked", 1),
     ("incoming:unpacked", 1), ("incoming:marked", 1), ("incoming:complete", 1)],
)  # fmt: skip
def test_killed_anywhere_it_goes_on(tmp_path: Path, place: str, count: int) -> None:
    data, folder = tmp_path / "data", tmp_path / "incoming"
    data.write_bytes(WHOLE)
    words = [sys.executable, "-c", KILLED, str(data), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in [str(Path.cwd()), *sys.path] if p)}
    killed = subprocess.run([*words, place, str(count)], check=False, timeout=60, env=environment)
    assert killed.returncode == -9
    incoming = Incoming(folder)
    assert len(incoming.complete()) == (place == "incoming:complete")
    again = incoming.open(offer(WHOLE))
    assert again.blocks == (count if place == "incoming:block" else again.total)
    again.close()
    subprocess.run([*words, "never", "1"], check=True, timeout=60, env=environment)
    assert incoming.complete()[0].archive.read_bytes() == ARCHIVE
    assert names(incoming) == [SHA384[:24]]


# --- agreeing


@pytest.mark.parametrize(
    ("offered", "own", "agreed"),
    [((65_536, 16, 0), (65_536, 16, 0), (65_536, 16, 0)),
     ((131_072, 64, 0), (4096, 4, 0), (4096, 4, 0)),
     ((1 << 20, 1000, 0), (131_072, 64, 0), (131_072, 64, 0)),
     ((2048, 2, 0), (65_536, 16, 0), (2048, 2, 0)),
     ((65_536, 16, 1_000_000), (65_536, 16, 0), (65_536, 16, 1_000_000)),
     ((65_536, 16, 1_000_000), (65_536, 16, 50_000), (65_536, 7, 50_000)),
     ((65_536, 16, 0), (65_536, 16, 2048), (20_480, 1, 2048)),
     ((65_536, 16, 0), (65_536, 16, 1), (10_240, 1, 1024))],
)  # fmt: skip
def test_what_both_sides_agree_on(
    offered: tuple[int, ...], own: tuple[int, ...], agreed: tuple[int, ...]
) -> None:
    block, window, rate = offered
    assert agree(offer(WHOLE, block=block, window=window, rate_bytes_s=rate), *own) == Terms(*agreed)


@pytest.mark.parametrize("changes", [{"block": 1023}, {"block": -1}, {"window": 0}, {"rate_bytes_s": -1}])
def test_figures_out_of_bounds(changes: dict[str, int]) -> None:
    with pytest.raises(InputError) as caught:
        agree(offer(WHOLE, **changes), 65_536, 16, 0)
    assert caught.value.code == "bad-offer"


@given(data=st.text(max_size=60))
def test_a_block_in_any_encoding(data: str) -> None:
    try:
        decode_block(data)
    except InputError as error:
        assert error.code == "bad-encoding"


@pytest.mark.parametrize("data", ["A", "AB=", "AAAA\n", " AAAA", "AA==AA==", "ÄÖÜ=", "AA-_", "\ud800"])
def test_a_block_in_another_encoding(data: str) -> None:
    with pytest.raises(InputError):
        decode_block(data)


@given(
    script=st.lists(
        st.tuples(st.sampled_from(["next", "repeat", "skip", "short", "reopen", "end"]), st.integers(0, 3)),
        max_size=25,
    )
)
def test_any_order_of_calls(tmp_path_factory: pytest.TempPathFactory, script: list[tuple[str, int]]) -> None:
    """Whatever comes, what is whole is right, and an error leaves nothing."""
    data = parcel(b"x" * 5000)
    sha384 = hashlib.sha384(data).hexdigest()
    wanted: UpdateOffer = offer(data, block=2048)
    incoming = Incoming(tmp_path_factory.mktemp("x") / "i", clock=Booted())
    receiving, each = incoming.open(wanted), blocks(data, 2048)
    for what, by in script:
        at = receiving.blocks
        try:
            if what == "next" and at < len(each):
                assert receiving.block(at, each[at]) == at + 1
            elif what == "repeat":
                receiving.block(max(0, at - 1 - by), each[0])
            elif what == "skip":
                receiving.block(at + 1 + by, each[0])
            elif what == "short" and at < len(each):
                receiving.block(at, each[at][: -1 - by])
            elif what == "end":
                assert receiving.end(sha384).archive.read_bytes() == b"x" * 5000
            elif what == "reopen":
                receiving.close()
                receiving = incoming.open(wanted)
                assert receiving.blocks == at
        except InstarError:
            assert not incoming.part(sha384).exists()
            receiving = incoming.open(wanted)
    receiving.close()
