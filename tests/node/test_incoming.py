"""Parcels on a node's disk: what is unpacked, what is refused, what a cut leaves."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.core.errors import InputError, InstarError, MachineError, TrustError
from instar.host.blocks import SYNC_EVERY, Receiving, Terms, agree, decode_block
from instar.host.clock import Clock
from instar.host.files import Disk
from instar.host.incoming import Incoming
from instar.host.parcel import Limits, unpack_parcel
from instar.wire.messages import UpdateOffer
from tests.node import parcels
from tests.node.parcels import DIGEST, METADATA, blocks, offer, pack, parcel, record

ARCHIVE = os.urandom(50_000)
WHOLE = parcel(ARCHIVE)
SHA384 = hashlib.sha384(WHOLE).hexdigest()


class Booted(Clock):
    """A clock of some boot."""

    def __init__(self, boot_id: str = "boot-1") -> None:
        self._boot_id = boot_id

    def boot_id(self) -> str:
        return self._boot_id


@pytest.fixture
def incoming(tmp_path: Path) -> Incoming:
    return Incoming(tmp_path / "incoming", clock=Booted())


def names(incoming: Incoming) -> list[str]:
    return sorted(os.listdir(incoming.folder)) if incoming.folder.exists() else []


def receive(receiving: Receiving, data: bytes, count: int = 1 << 30) -> None:
    each = blocks(data, receiving.block_size)
    for number in range(receiving.blocks, min(len(each), receiving.blocks + count)):
        receiving.block(number, each[number])


# --- unpacking


def test_what_is_unpacked(tmp_path: Path) -> None:
    found = unpack_parcel(io.BytesIO(WHOLE), tmp_path / "p")
    assert found.archive.read_bytes() == ARCHIVE
    assert {f"metadata/{p.name}": p.read_bytes() for p in found.metadata.iterdir()} == METADATA
    assert (found.kind, found.version, found.digest, found.length) == ("node", "1.1.0", DIGEST, len(ARCHIVE))
    assert sorted(p.name for p in found.folder.iterdir()) == ["archive", "metadata", "parcel.json"]


def link(kind: bytes) -> parcels.Change:
    def change(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.type, info.linkname = kind, "archive"
        return info

    return change


def named(name: str) -> bytes:
    first = ("parcel.json", json.dumps(record(ARCHIVE)).encode())
    return pack([first, *METADATA.items(), (name, b"x"), ("archive", ARCHIVE)])


def order(*wanted: str) -> bytes:
    every = {"parcel.json": json.dumps(record(ARCHIVE)).encode(), **METADATA, "archive": ARCHIVE}
    return pack([(name, every[name]) for name in wanted])


def of_kind(kind: bytes, name: str = "metadata/timestamp.json") -> bytes:
    files = [("parcel.json", json.dumps(record(ARCHIVE)).encode()), *METADATA.items(), ("archive", ARCHIVE)]
    return pack(files, {name: link(kind)})


EVIL: dict[str, bytes] = {
    "nothing": b"",
    "no tar": os.urandom(4096),
    "an empty tar": bytes(10_240),
    "gzip": b"\x1f\x8b" + bytes(1000),
    "leads out": named("metadata/../../x.root.json"),
    "absolute": named("/etc/passwd"),
    "another name": named("metadata/1.mirrors.json"),
    "version 0": named("metadata/0.root.json"),
    "a folder between": named("metadata/a/1.root.json"),
    "twice the same": pack([("parcel.json", json.dumps(record(ARCHIVE)).encode()), *METADATA.items(), ("metadata/1.root.json", b"x"), ("archive", ARCHIVE)]),
    "two snapshots": named("metadata/6.snapshot.json"),
    "archive first": order("archive", "parcel.json"),
    "record not first": order("metadata/1.root.json", "parcel.json", "archive"),
    "no metadata": order("parcel.json", "archive"),
    "no timestamp": order("parcel.json", "metadata/1.root.json", "metadata/5.snapshot.json", "metadata/4.targets.json", "archive"),
    "no archive": order("parcel.json", *METADATA),
    "metadata after it": order("parcel.json", *list(METADATA)[:4], "archive", "metadata/4.targets.json"),
    "symbolic link": of_kind(tarfile.SYMTYPE),
    "hard link": of_kind(tarfile.LNKTYPE, "archive"),
    "device": of_kind(tarfile.CHRTYPE),
    "pipe": of_kind(tarfile.FIFOTYPE),
    "folder": of_kind(tarfile.DIRTYPE),
    "pax": pack([("parcel.json", b"{}"), ("metadata/" + "ü" * 80, b"x")], form=tarfile.PAX_FORMAT),
    "gnu long name": pack([("parcel.json", b"{}"), ("m" * 200, b"x")], form=tarfile.GNU_FORMAT),
    "cut in the archive": WHOLE[:20_000],
    "cut in a header": WHOLE[:700],
    "cut before its end": WHOLE[: -(10_240 - 512)],
    "more behind it": WHOLE + b"x",
    "endless zeros": WHOLE + bytes(1 << 20),
    "another archive": parcel(ARCHIVE, sha256="0" * 64),
    "a longer archive": parcel(ARCHIVE, length=len(ARCHIVE) - 1),
    "a shorter archive": parcel(ARCHIVE, length=len(ARCHIVE) + 1),
    "no length": parcel(ARCHIVE, length=None),
    "true as length": parcel(ARCHIVE, length=True),
    "too long": parcel(ARCHIVE, length=1 << 40),
    "another format": parcel(ARCHIVE, format=2),
    "another kind": parcel(ARCHIVE, kind="module", target="module/a-1.0.0.tar.gz"),
    "target of another kind": parcel(ARCHIVE, target="recovery/core-1.1.0.pyz"),
    "target leads out": parcel(ARCHIVE, target="node/../x"),
    "bad version": parcel(ARCHIVE, version="../.."),
    "bad digest": parcel(ARCHIVE, digest="ab"),
    "metadata too large": parcel(ARCHIVE, {**METADATA, "metadata/timestamp.json": bytes((4 << 20) + 1)}),
    "metadata empty": parcel(ARCHIVE, {**METADATA, "metadata/timestamp.json": b""}),
    "too many files": parcel(ARCHIVE, {**METADATA, **{f"metadata/{n}.root.json": b"x" for n in range(3, 210)}}),
    "a large record": pack([("parcel.json", b" " * 20_000), ("archive", b"x")]),
    "a list as record": pack([("parcel.json", b"[]"), ("archive", b"x")]),
    "deep record": pack([("parcel.json", b"[" * 15_000), ("archive", b"x")]),
}  # fmt: skip


@pytest.mark.parametrize("what", EVIL)
def test_what_is_refused(incoming: Incoming, what: str) -> None:
    data = EVIL[what]
    with pytest.raises(TrustError) as caught:
        incoming.store(io.BytesIO(data), hashlib.sha384(data).hexdigest())
    assert caught.value.code in ("bad-parcel", "cut-parcel"), caught.value.text
    assert caught.value.text.startswith("cannot unpack the parcel: ")
    assert caught.value.text.isprintable()
    assert names(incoming) == []
    assert incoming.complete() == []


@given(at=st.integers(0, len(WHOLE) - 1), value=st.integers(0, 255))
def test_no_byte_can_be_changed(tmp_path_factory: pytest.TempPathFactory, at: int, value: int) -> None:
    """Whoever unpacks knows the SHA-384 of the whole. Without it, nothing worse than a refusal comes."""
    data = bytearray(WHOLE)
    if data[at] == value:
        return
    data[at] = value
    incoming = Incoming(tmp_path_factory.mktemp("x"))
    with pytest.raises(TrustError):
        incoming.store(io.BytesIO(data), SHA384)
    assert names(incoming) == []


@given(data=st.binary(max_size=3000))
def test_any_bytes_are_refused_in_words(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    with pytest.raises(TrustError):
        unpack_parcel(io.BytesIO(data), tmp_path_factory.mktemp("x") / "p")


def test_metadata_are_bounded_together(tmp_path: Path) -> None:
    few = Limits(metadata=100, all_metadata=60)
    with pytest.raises(TrustError, match="expected 1 to"):
        unpack_parcel(io.BytesIO(WHOLE), tmp_path / "p", few)
    assert not (tmp_path / "p").exists()


STREAMING = """
import hashlib, io, json, resource, sys, tarfile
from pathlib import Path
from instar.host.incoming import Incoming
size = int(sys.argv[2])

class Source:
    '''A parcel with an archive of zeros, made as it is read.'''
    def __init__(self):
        digest = hashlib.sha256()
        for _ in range(size >> 20): digest.update(bytes(1 << 20))
        said = {"format": 1, "kind": "node", "version": "1.1.0", "digest": "ab" * 48,
                "target": "node/x.tar.gz", "length": size, "sha256": digest.hexdigest()}
        def member(name, data):
            info = tarfile.TarInfo(name); info.size = len(data) if data is not None else size
            head = info.tobuf(tarfile.USTAR_FORMAT)
            return head if data is None else head + data + bytes(-len(data) % 512)
        head = member("parcel.json", json.dumps(said).encode())
        for name in ("1.root", "timestamp", "1.snapshot", "1.targets"):
            head += member(f"metadata/{name}.json", b"{}")
        self.head, self.left, self.tail = io.BytesIO(head + member("archive", None)), size, io.BytesIO(bytes(1024))
    def read(self, most):
        if data := self.head.read(most): return data
        if self.left:
            count = min(most, self.left); self.left -= count
            return bytes(count)
        return self.tail.read(most)

def whole():
    digest, source = hashlib.sha384(), Source()
    while chunk := source.read(1 << 18): digest.update(chunk)
    return digest.hexdigest()

sha384 = whole()
source = Source()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
parcel = Incoming(Path(sys.argv[1])).store(source, sha384)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"kib": after - before, "size": parcel.archive.stat().st_size}))
"""


def test_200_mb_in_constant_memory(tmp_path: Path) -> None:
    size = 200 << 20
    done = subprocess.run(
        [sys.executable, "-c", STREAMING, str(tmp_path / "i"), str(size)],
        stdout=subprocess.PIPE, check=True, timeout=120, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert said["size"] == size
    assert said["kib"] < 4096


# --- in blocks


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


# --- keeping and removing


def another(number: int, **changes: Any) -> tuple[bytes, str]:
    data = parcel(b"archive %d" % number, digest=f"{number:096x}", **changes)
    return data, hashlib.sha384(data).hexdigest()


def test_two_are_kept(incoming: Incoming) -> None:
    for number in range(4):
        data, sha384 = another(number)
        incoming.store(io.BytesIO(data), sha384)
        os.utime(incoming.folder / sha384[:24], (number, number))
    assert [int(p.digest, 16) for p in incoming.complete()] == [3, 2]
    receiving = incoming.open(offer(WHOLE))
    receive(receiving, WHOLE, 1)
    assert [int(p.digest, 16) for p in incoming.complete()] == [3]
    assert len({name[:24] for name in names(incoming)}) == 2


def test_sweep(incoming: Incoming) -> None:
    now = time.time()
    for number in (1, 2):
        data, sha384 = another(number)
        incoming.store(io.BytesIO(data), sha384)
    (incoming.folder / "notes.txt").write_text("not ours")
    receiving = incoming.open(offer(parcel(b"third")))
    (incoming.folder / f"{'0' * 24}.part").write_bytes(b"x")
    receiving.close()
    incoming.sweep({f"{1:096x}"}, now)
    assert len(incoming.complete()) == 2
    incoming.sweep({f"{1:096x}"}, now + 90_000)
    assert [int(p.digest, 16) for p in incoming.complete()] == [1]
    assert names(incoming)[1:] == ["notes.txt"]
    incoming.complete()[0].archive.rename(incoming.folder.parent / "taken")  # as the stage step takes it
    incoming.sweep({f"{1:096x}"}, now)
    assert len(names(incoming)) == 2
    incoming.sweep(set(), now)
    assert names(incoming) == ["notes.txt"]


def test_a_core_is_no_release(incoming: Incoming) -> None:
    core = parcel(b"core", kind="recovery")
    found = incoming.store(io.BytesIO(core), hashlib.sha384(core).hexdigest())
    assert incoming.find("agent", DIGEST) is None
    assert incoming.complete() == [found]
    incoming.remove(found)
    incoming.remove(found)
    assert names(incoming) == []


@pytest.mark.parametrize("harm", ["marker", "no-marker", "archive", "record"])
def test_a_harmed_one_is_none(incoming: Incoming, harm: str) -> None:
    found = incoming.store(io.BytesIO(WHOLE), SHA384)
    if harm == "marker":
        (found.folder / "complete").write_text("0" * 96)
    elif harm == "no-marker":
        (found.folder / "complete").unlink()
    elif harm == "archive":
        found.archive.write_bytes(b"short")
    else:
        (found.folder / "parcel.json").write_text("[]")
    assert incoming.complete() == []
    assert incoming.of_sha384(SHA384) is None
    assert incoming.store(io.BytesIO(WHOLE), SHA384).archive.read_bytes() == ARCHIVE


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


def test_what_an_open_transaction_needs_is_never_put_out(incoming: Incoming) -> None:
    first = incoming.store(io.BytesIO(WHOLE), SHA384)
    incoming.need(first)
    os.utime(first.folder, (1.0, 1.0))  # the oldest
    for number in (1, 2):
        data, sha384 = another(number)
        incoming.store(io.BytesIO(data), sha384)
    assert {parcel.digest for parcel in incoming.complete()} == {DIGEST, f"{2:096x}"}
    second = incoming.find("agent", f"{2:096x}")
    assert second is not None
    incoming.need(second)
    before = names(incoming)
    data, sha384 = another(3)
    with pytest.raises(MachineError) as caught:
        incoming.store(io.BytesIO(data), sha384)
    assert caught.value.code == "no-space"
    with pytest.raises(MachineError) as caught:
        receive(incoming.open(offer(data, digest=f"{3:096x}")), data)
    assert caught.value.code == "no-space"
    assert names(incoming) == before
    incoming.store(io.BytesIO(WHOLE), SHA384)  # the same again is no other
    incoming.release(second)
    incoming.store(io.BytesIO(data), sha384)
    assert {parcel.digest for parcel in incoming.complete()} == {DIGEST, f"{3:096x}"}


def test_what_another_writer_is_about_to_bring_is_left_alone(incoming: Incoming) -> None:
    receive(incoming.open(offer(WHOLE)), WHOLE, 2)
    part = incoming.part(SHA384)
    pushed = incoming.folder / f"{'9' * 24}.push.new"
    for number in (1, 2, 3):
        data, sha384 = another(number)
        incoming.store(io.BytesIO(data), sha384, "push")
    assert part.exists()
    assert len(incoming.complete()) == 2
    pushed.mkdir()
    data, _ = another(4)
    receive(incoming.open(offer(data, digest=f"{4:096x}")), data, 1)
    assert pushed.exists()
    assert not part.exists(), "its own, of another offer, makes room"
    part = next(incoming.folder.glob("*.part"))
    pushed.rmdir()
    os.utime(part, (1.0, 1.0))
    os.utime(part.with_suffix(".offer.json"), (1.0, 1.0))
    data, sha384 = another(5)
    incoming.store(io.BytesIO(data), sha384, "push")
    assert not part.exists(), "nobody has written to it for an hour"
