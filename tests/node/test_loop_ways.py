"""updater.loop: the ways by which a release comes (pull, native, recovery)."""

from __future__ import annotations

import os

import pytest

from instar.core.errors import InputError, ServerUnreachable
from instar.core.journal import Begin
from instar.core.wish import read_wanted
from instar.host.incoming import COMPLETE, NEEDED
from instar.updater.client import ARTIFACTS
from tests.node.looping import AWAY, World
from tests.node.test_stage_parcel import bring
from tests.node.world import Node

DAY_S = 86_400.0


@pytest.fixture
def world(node: Node) -> World:
    return World(node)


# --- native and recovery


def test_a_native_wish_waits_for_its_parcel_and_fetches_nothing(world: World) -> None:
    world.wish(via="native")
    assert 270 <= world.loop.round() <= 330
    assert world.begun == []
    bring(world.node)
    world.loop.round()
    assert world.current == world.node.new.name
    assert [begin.via for begin in world.begun] == ["native"]
    assert world.node.server.served.asked == []


def test_a_native_wish_whose_parcel_is_gone_holds_nobody_up(world: World) -> None:
    """It was begun, and then the parcel went: the round goes on to its end, and ends it after a day."""
    node, line = world.node, world.node.line
    world.wish(via="native")
    release = node.new.release
    node.journals.begin(
        Begin(
            "tx-1", "agent", release.version, release.digest, "node/new.tar.gz", line.current(), "", "wish", 5,
            "native",
        )
    )  # fmt: skip
    assert world.loop.round() < 300
    assert len(world.client.troubles) == 1, "the server was asked, and the round went on"
    assert len(world.begun) == 1
    node.clock.now += DAY_S + 1
    world.loop.round()
    assert node.journals.unfinished() == []
    assert node.journals.read_all()[0].progress.reason.code == "too-old"  # type: ignore[union-attr]


def test_a_recovery_wish_is_left_to_the_core(world: World) -> None:
    world.wish(via="recovery")
    bring(world.node)
    assert 270 <= world.loop.round() <= 330
    assert world.begun == []


def test_what_a_dead_core_left_behind_ends_soon(world: World) -> None:
    node, release = world.node, world.node.new.release
    begin = Begin(
        "tx-r", "agent", release.version, release.digest, "node/new.tar.gz", node.line.current(), "", "recovery",
        0, "recovery",
    )  # fmt: skip
    node.journals.begin(begin)
    world.wish(via="recovery")
    world.loop.round()
    assert len(node.journals.unfinished()) == 1, "the core may come again"
    node.clock.now += 901
    world.loop.round()
    assert node.journals.unfinished() == []


def test_an_unknown_way_is_the_usual_one_and_a_wrong_place_is_refused() -> None:
    line = {"version": "1.0.0", "digest": "ab" * 48, "target": "node/x.tar.gz", "generation": 1}
    said = {"lines": {"agent": {**line, "via": "pigeon"}, "updater": {**line, "via": "native"},
                      "module/x": {**line, "via": "native"}}}  # fmt: skip
    wanted = read_wanted({**said, "artifacts": "https://10.0.0.1:7444/"})
    assert [(wish.line, wish.via) for wish in wanted.wishes] == [
        ("updater", "native"), ("agent", ""), ("module/x", ""),
    ]  # fmt: skip
    assert wanted.artifacts == "https://10.0.0.1:7444"
    assert read_wanted(said).artifacts == ""
    for bad in ("http://x:1", "https://x:1/path", "file:///etc", "https://u@x:1", "https://x y"):
        with pytest.raises(InputError):
            read_wanted({**said, "artifacts": bad})


# --- the artifacts cannot be reached


def test_the_server_is_told_that_the_artifacts_cannot_be_reached(world: World) -> None:
    world.node.server.fault = ServerUnreachable(ARTIFACTS, "no route")
    world.loop.round()
    world.loop.round()
    world.client.away = True
    world.loop.round()
    world.client.away = False
    world.loop.round()
    assert world.client.troubles == ["", ARTIFACTS, ARTIFACTS]
    world.node.clock.now += 60
    bring(world.node)
    world.loop.round()
    assert world.current == world.node.old.name, "the rehearsal needs the server, and that is the same here"
    world.node.server.fault = None
    world.loop.round()
    assert world.current == world.node.new.name
    world.loop.round()
    assert world.client.troubles[-1] == ""


def test_another_fault_is_not_told_as_trouble(world: World) -> None:
    world.node.server.fault = ServerUnreachable("stale-mirror", "waiting")
    world.loop.round()
    world.loop.round()
    assert world.client.troubles == ["", ""]


# --- parcels that are used up


def test_a_parcel_stays_while_it_is_needed_and_goes_with_its_transaction(world: World) -> None:
    world.wish(via="native")
    bring(world.node)
    world.node.server.fault = AWAY
    world.loop.round()
    assert world.parcels() == 1
    world.node.server.fault = None
    marker = next(world.node.layout.incoming.glob(f"*/{COMPLETE}"))
    wall = world.node.clock.wall()
    os.utime(marker, (wall - 1, wall - 1))
    world.loop.round()
    assert world.current == world.node.new.name
    assert world.parcels() == 0


def test_a_parcel_that_came_after_the_last_transaction_is_for_the_next(world: World) -> None:
    world.loop.round()
    bring(world.node)  # the machine's clock is far past the fake one
    world.loop.round()
    assert world.parcels() == 1


def test_a_parcel_that_came_while_its_release_was_under_way_is_given_time(world: World) -> None:
    """It was fetched, and the parcel came meanwhile, for a wish to come: nothing has used it yet."""
    clock = world.node.clock
    world.loop.round()
    (journal,) = world.node.journals.read_all()
    assert journal.progress.changed is not None
    came = journal.progress.began.wall + 0.01
    assert came < journal.progress.changed.wall
    bring(world.node)
    os.utime(next(world.node.layout.incoming.glob(f"*/{COMPLETE}")), (came, came))
    world.loop.round()
    assert world.parcels() == 1
    clock.now += 901.0
    world.loop.round()
    assert world.parcels() == 0


def test_parcels_are_not_looked_at_while_one_is_pushed(world: World) -> None:
    world.loop.round()
    bring(world.node)
    for path in world.node.layout.incoming.rglob("*"):
        os.utime(path, (1.0, 1.0))
    world.orders.reserve("tx-2", "agent", 100)
    world.loop.round()
    assert world.parcels() == 1
    world.orders.give_up("tx-2")
    world.loop.round()
    assert world.parcels() == 0


def test_a_parcel_is_marked_while_its_transaction_is_open(world: World) -> None:
    marked = world.node.layout.incoming.glob
    world.wish(via="native")
    bring(world.node)
    world.node.server.fault = AWAY
    world.loop.round()
    assert len(list(marked(f"*/{NEEDED}"))) == 1
    world.node.server.fault = None
    world.loop.round()
    assert world.current == world.node.new.name
    world.client.away = True
    world.loop.round()
    assert list(marked(f"*/{NEEDED}")) == [], "also when no server says what is wanted"
