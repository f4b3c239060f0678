"""A parcel as a file that was made by anybody: what is unpacked, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.core.errors import TrustError
from instar.host.incoming import Incoming
from instar.host.parcel import Limits, unpack_parcel
from tests.node import parcels
from tests.node.parcels import DIGEST, METADATA, pack, parcel, record
from tests.node.receiving import ARCHIVE, SHA384, WHOLE, incoming, names

__all__ = ["incoming"]  # a fixture


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
