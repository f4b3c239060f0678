"""Staging from a parcel that is on the node: taken if it is what is signed, waited for where nothing else may do."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest

from instar.core.errors import InstarError, MachineError, ServerUnreachable, TrustError
from instar.core.journal import Begin
from instar.engine.driver import drive
from instar.engine.journal import Journal
from instar.engine.target import NotNow
from instar.host import points
from instar.host.incoming import Incoming, Parcel
from instar.host.records import read_quarantine
from instar.targets.kit import TrustedTarget
from tests.node import parcels
from tests.node.world import Built, Node, Quiet

AWAY = ServerUnreachable("server-unreachable", "no route")


class Kill(BaseException):
    pass


class Bytes:
    """A stream of what is at hand."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def read(self, most: int, /) -> bytes:
        self._at += most
        return self._data[self._at - most : self._at]


def bring(node: Node, built: Built | None = None, archive: bytes | None = None) -> Parcel:
    """Put the parcel of a release where the channel or the API puts it."""
    release = (built or node.new).release
    data = parcels.parcel(
        (built or node.new).archive if archive is None else archive,
        version=release.version,
        digest=release.digest,
        target="node/new.tar.gz",
    )
    incoming = Incoming(node.layout.incoming, node.disk)
    return incoming.store(Bytes(data), hashlib.sha384(data).hexdigest())


def begin(node: Node, via: str = "", cause: str = "wish", tx: str = "tx-1") -> Journal:
    release, line = node.new.release, node.line
    return node.journals.begin(
        Begin(
            tx, "agent", release.version, release.digest, "node/new.tar.gz", line.current(), line.previous(),
            cause, 1, via,
        )
    )  # fmt: skip


def test_a_parcel_takes_the_servers_place(node: Node) -> None:
    parcel = bring(node)
    node.boot()
    end = drive(begin(node), node.target(), Quiet())
    assert end.state.value == "confirmed", end.reason
    assert node.server.metadata == [parcel.metadata]
    assert node.server.served.asked == [], "nothing was fetched"
    assert parcel.archive.exists(), "the other line needs it too"


@pytest.mark.parametrize("via", ["native", "push", "recovery"])
def test_what_must_come_as_a_parcel_is_waited_for(node: Node, via: str) -> None:
    node.boot()
    journal = begin(node, via)
    for _ in range(8):
        with pytest.raises(NotNow) as caught:
            drive(journal, node.target(), Quiet())
        assert caught.value.reason.code == "waits-for-parcel"
    assert node.server.metadata == []
    assert node.server.served.asked == []
    bring(node)
    assert drive(journal, node.target(), Quiet()).state.value == "confirmed"


@pytest.mark.parametrize("via", ["", "native"])
def test_of_a_release_that_is_on_the_disk_the_parcel_still_says_what_is_signed(node: Node, via: str) -> None:
    """Back to an earlier release, on a node that cannot reach the artifacts: it would wait for them for ever."""
    node.boot()
    assert drive(begin(node), node.target(), Quiet()).state.value == "confirmed"
    node.line.activate(node.line.previous(), fallback=node.new.release.name)
    before, fetched = list(node.server.metadata), list(node.server.served.asked)
    parcel, journal = bring(node), begin(node, via, tx="tx-2")
    drive(journal, node.target(), Quiet())
    assert node.server.metadata == [*before, parcel.metadata]
    assert node.server.served.asked == fetched


def test_a_release_that_is_on_the_disk_waits_for_no_parcel(node: Node) -> None:
    node.boot()
    assert drive(begin(node), node.target(), Quiet()).state.value == "confirmed"
    node.line.activate(node.line.previous(), fallback=node.new.release.name)
    drive(begin(node, "native", tx="tx-2"), node.target(), Quiet())
    assert node.server.metadata == [None, None]


def test_a_recovery_core_may_have_brought_the_archive_by_itself(node: Node) -> None:
    node.boot()
    journal = begin(node, "recovery", "recovery")
    staging = node.layout.staging / "tx-1"
    staging.mkdir()
    (staging / "archive").write_bytes(node.new.archive)
    assert drive(journal, node.target(), Quiet()).state.value == "confirmed"
    assert node.server.served.asked == []


def test_a_parcel_comes_while_the_server_cannot_be_reached(node: Node) -> None:
    node.boot()
    journal = begin(node)
    node.server.served.cut_at = [100] * 20
    node.server.served.ranges = False  # so that no try gets further than the one before
    with pytest.raises(NotNow):
        drive(journal, node.target(), Quiet())
    assert (node.layout.staging / "tx-1" / "archive").stat().st_size == 100
    bring(node)
    assert drive(journal, node.target(), Quiet()).state.value == "confirmed"


def test_another_archive_than_the_signed_one_is_refused_and_does_not_count_against_the_release(
    node: Node,
) -> None:
    parcel = bring(node, archive=node.new.archive + b"x")
    node.boot()
    end = drive(begin(node), node.target(), Quiet())
    assert end.reason is not None
    assert (end.state.value, end.reason.code) == ("reverted", "altered-parcel")
    assert not parcel.folder.exists()
    assert read_quarantine(node.layout.quarantine) == {}
    assert drive(begin(node, tx="tx-2"), node.target(), Quiet()).state.value == "confirmed"


EXPIRED = ServerUnreachable("expired-metadata", "timestamp has expired")
FORGED = TrustError("bad-signature", "cannot trust timestamp")


def refuse(node: Node, fault: InstarError) -> None:
    """What the metadata of parcels come to."""
    trusted = node.server.trusted_target

    def trusted_target(name: str, metadata: Path | None = None) -> TrustedTarget:
        if metadata is not None:
            raise fault
        return trusted(name)

    node.server.trusted_target = trusted_target  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("fault", [EXPIRED, FORGED])
def test_a_push_whose_metadata_are_of_no_use_changes_nothing(node: Node, fault: InstarError) -> None:
    parcel = bring(node)
    node.boot()
    refuse(node, fault)
    end = drive(begin(node, "push", "push"), node.target(), Quiet())
    assert end.reason is not None
    assert (end.state.value, end.reason.code) == ("reverted", fault.code)
    assert node.line.current() == node.old.name
    assert read_quarantine(node.layout.quarantine) == {}
    assert not parcel.folder.exists()


@pytest.mark.parametrize("fault", [EXPIRED, FORGED])
def test_a_parcel_whose_metadata_are_of_no_use_does_not_block_its_release(
    node: Node, fault: InstarError
) -> None:
    parcel = bring(node)
    node.boot()
    refuse(node, fault)
    assert drive(begin(node), node.target(), Quiet()).state.value == "confirmed", "the server was asked"
    assert node.server.served.asked == [0]
    assert not parcel.folder.exists()


@pytest.mark.parametrize("fault", [EXPIRED, FORGED])
def test_another_one_is_waited_for_where_it_must_come_as_a_parcel(node: Node, fault: InstarError) -> None:
    parcel = bring(node)
    node.boot()
    sound = node.server.trusted_target
    refuse(node, fault)
    journal = begin(node, "native")
    with pytest.raises(NotNow) as caught:
        drive(journal, node.target(), Quiet())
    assert caught.value.reason.code == "waits-for-parcel"
    assert not parcel.folder.exists()
    node.server.trusted_target = sound  # type: ignore[method-assign]
    bring(node)
    assert drive(journal, node.target(), Quiet()).state.value == "confirmed"


def test_a_fault_of_the_machine_is_not_the_parcels(node: Node) -> None:
    parcel = bring(node)
    node.boot()
    refuse(node, MachineError("verify-failed", "the verify child was killed"))
    assert drive(begin(node), node.target(), Quiet()).state.value == "reverted"
    assert parcel.folder.exists()


def test_progress_is_told_while_bytes_come(node: Node) -> None:
    told: list[tuple[int, int]] = []
    kit = node.kit()
    target = node.target()
    target.kit = type(kit)(
        kit.layout, kit.clock, kit.services, kit.server, kit.settings, kit.program, kit.sleep, kit.disk,
        lambda done, total: told.append((done, total)),
    )  # fmt: skip
    node.boot()
    drive(begin(node), target, Quiet())
    size = len(node.new.archive)
    assert told[-1] == (size, size)


def test_killed_anywhere_it_comes_to_its_end_without_the_server(folder: Path) -> None:
    """A kill at each named point of a push: the parcel is still there, or no longer needed."""
    for arrival in itertools.count(1):
        node = Node(folder / str(arrival))
        bring(node)
        node.boot()
        node.server.served.dead = True  # metadata and archive can only come from the parcel
        left = arrival

        def listen(_: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Kill

        journal = begin(node, "push", "push")
        points.listener = listen
        try:
            drive(journal, node.target(), Quiet())
        except Kill:
            pass
        finally:
            points.listener = None
        for opened in node.journals.unfinished():
            drive(opened, node.target(), Quiet())
        assert node.journals.read_all()[-1].progress.state.value == "confirmed", arrival
        assert node.line.current() == node.new.name
        assert node.line.is_valid(node.new.name)
        assert json.loads(node.layout.held.read_bytes())["agent"]["digest"] == node.new.release.digest
        assert None not in node.server.metadata
        assert list(node.layout.staging.iterdir()) == []
        node.close()
        if left > 0:
            assert arrival > 20
            return
