"""Parcels that are here: how many are kept, for how long, and who may put out which."""

from __future__ import annotations

import hashlib
import io
import os
import time

import pytest

from instar.core.errors import MachineError
from instar.host.incoming import Incoming
from tests.node.parcels import DIGEST, offer, parcel
from tests.node.receiving import ARCHIVE, SHA384, WHOLE, another, incoming, names, receive

__all__ = ["incoming"]  # a fixture


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
