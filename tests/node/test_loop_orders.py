"""updater.ordered: what an operator orders on the node (a push, a rollback), and what holds after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, NoReturn

import pytest

from instar.core import held
from instar.core.errors import InputError
from instar.core.held import UNHEARD, Hold
from instar.host import points
from instar.host.records import read_held, write_held
from instar.updater.http.calls import Services
from instar.updater.http.documents import transactions
from instar.updater.orders import Orders
from instar.updater.targets import Targets
from tests.node.looping import AWAY, World, offer
from tests.node.world import Node, build, put


@pytest.fixture
def world(node: Node) -> World:
    return World(node)


# --- a push


def test_a_push_is_installed_and_holds_against_the_wish_it_went_against(world: World) -> None:
    world.wish(release=world.node.old.release)
    world.push()
    assert world.loop.wait(0.0)
    world.loop.round()
    assert world.current == world.node.new.name
    (begin,) = world.begun
    assert (begin.tx, begin.cause, begin.via, begin.generation) == ("tx-push", "push", "push", 5)
    for _ in range(2):
        world.loop.round()
        world.again()  # what holds is on the disk
    assert world.current == world.node.new.name
    assert read_held(world.node.layout.held)["agent"].generation == 5
    world.wish(generation=6)
    world.node.server.offered = world.node.old
    world.loop.round()
    assert world.current == world.node.old.name
    assert read_held(world.node.layout.held) == {}


def test_a_push_without_a_server_holds_against_the_first_wish_that_is_heard(world: World) -> None:
    world.client.away = True
    world.wish(release=world.node.old.release)
    world.push()
    world.loop.round()
    assert read_held(world.node.layout.held)["agent"].generation == UNHEARD
    world.client.away = False
    world.loop.round()
    assert world.current == world.node.new.name
    assert read_held(world.node.layout.held)["agent"].generation == 5


def test_a_rollback_ends_the_hold(world: World) -> None:
    world.wish(release=world.node.old.release)
    world.push()
    world.loop.round()
    world.orders.order_rollback("agent")
    world.loop.round()
    assert world.current == world.node.old.name
    assert read_held(world.node.layout.held) == {}


def test_a_push_that_fails_holds_nothing(world: World) -> None:
    world.wish(release=world.node.old.release)
    world.node.crashing.add(world.node.new.name)
    world.push()
    world.loop.round()
    assert world.current == world.node.old.name
    assert read_held(world.node.layout.held) == {}
    assert world.node.journals.unfinished() == []


def test_a_push_ends_a_wish_that_is_under_way_and_waits(world: World) -> None:
    other = build("1.2.0")
    world.node.server.fault = AWAY
    world.loop.round()
    assert len(world.node.journals.unfinished()) == 1
    world.node.server.fault = None
    offer(world.node, other)
    world.push(other)
    world.loop.round()
    assert world.current == other.name
    states = {j.progress.begin.cause: j.progress.state.value for j in world.node.journals.read_all()}
    assert states == {"wish": "reverted", "push": "confirmed"}


def test_one_order_at_a_time(world: World) -> None:
    world.push()
    orders: list[Callable[[], None]] = [
        lambda: world.push(tx="tx-2"),
        lambda: world.orders.order_rollback("agent"),
    ]
    for order in orders:
        with pytest.raises(InputError) as caught:
            order()
        assert caught.value.code == "busy"
        assert "tx-push" in caught.value.text
    seen: list[str] = []
    points.listener = lambda _: seen.append(world.orders.under_way())
    try:
        world.loop.round()
    finally:
        points.listener = None
    assert "tx-push" in seen
    assert world.orders.under_way() == ""


def test_progress_is_told_to_other_threads(world: World) -> None:
    seen: list[tuple[str, int, int]] = []

    def listen(_: str) -> None:
        doing = world.orders.doing()
        if not seen or seen[-1] != doing[1:]:
            seen.append(doing[1:])

    points.listener = listen
    try:
        before = world.orders.changes
        world.loop.round()
    finally:
        points.listener = None
    size = len(world.node.new.archive)
    phases = [phase for phase, _, _ in seen if phase]
    assert list(dict.fromkeys(phases)) == [
        "stage", "verify", "rehearse", "activate", "watch", "confirm",
    ]  # fmt: skip
    assert ("stage", size, size) in seen
    assert world.orders.wait_past(before, 0.0) > before
    assert world.orders.doing().tx == ""


def test_what_is_shown_as_finished_refuses_no_order(world: World) -> None:
    """Whoever has waited for the end of one may order the next at once."""
    node, seen = world.node, set[tuple[bool, str]]()

    def nobody() -> NoReturn:
        raise AWAY

    services = Services(
        node.layout, node.clock, node.program(), world.orders, Targets(node.kit()), node.journals, "n", nobody
    )

    def listen(_: str) -> None:
        for shown in transactions(services, 5)["transactions"]:
            seen.add((shown["finished"], world.orders.under_way()))

    points.listener = listen
    try:
        world.loop.round()
    finally:
        points.listener = None
    listen("")
    (begin,) = world.begun
    assert (False, begin.tx) in seen
    assert {under_way for finished, under_way in seen if finished} == {""}


def test_an_order_does_not_wait_behind_a_push_that_waits_for_the_server(world: World) -> None:
    world.loop.round()
    assert world.current == world.node.new.name
    other = build("1.2.0")
    offer(world.node, other)
    world.push(other)
    world.node.server.fault = AWAY  # the rehearsal asks the server: the push stays open
    world.loop.round()
    assert [j.progress.begin.tx for j in world.node.journals.unfinished()] == ["tx-push"]
    assert world.orders.under_way() == ""
    world.orders.order_rollback("agent")
    world.loop.round()
    ends = {j.progress.begin.cause: j.progress for j in world.node.journals.read_all()}
    assert ends["push"].state.value == "reverted"
    assert ends["push"].reason is not None
    assert ends["push"].reason.code == "superseded"
    assert ends["rollback"].begin.version == "1.0.0", "begun although the server is away"
    world.node.server.fault = None
    world.loop.round()
    assert world.current == world.node.old.name


def test_a_push_does_not_wait_behind_another_that_waits_for_the_server(world: World) -> None:
    world.wish(release=world.node.old.release)
    world.push()
    world.node.server.fault = AWAY
    world.loop.round()
    other = build("1.2.0")
    offer(world.node, other)
    world.push(other, tx="tx-2")
    world.loop.round()
    assert [j.progress.begin.tx for j in world.node.journals.unfinished()] == ["tx-2"]
    world.node.server.fault = None
    world.loop.round()
    assert world.current == other.name


def test_a_push_that_cannot_be_begun_is_not_forgotten(world: World) -> None:
    world.push()
    journal = world.node.layout.journal
    journal.rename(journal.with_name("away"))
    journal.write_text("")
    world.loop.round()
    assert world.orders.under_way() == "tx-push"
    journal.unlink()
    journal.with_name("away").rename(journal)
    world.loop.round()
    assert world.current == world.node.new.name


# --- holds


def test_hold_rules() -> None:
    hold = Hold("1.0.0", "ab" * 48, 5, 0.0)
    assert held.heard({"agent": hold}, {"agent": 5}) == {"agent": hold}
    assert held.heard({"agent": hold}, {}) == {"agent": hold}
    assert held.heard({"agent": hold}, {"agent": 6}) == {}
    unheard = replace(hold, generation=UNHEARD)
    assert held.heard({"agent": unheard}, {"agent": 9}) == {"agent": replace(hold, generation=9)}
    assert held.keeps({"agent": hold}, "agent", hold.release) is hold
    assert held.keeps({"agent": hold}, "agent", "1.1.0-000000000000") is None, "it is not what is current"
    assert held.keeps({"agent": hold}, "updater", hold.release) is None


def test_an_unreadable_hold_is_set_aside(node: Node) -> None:
    path = node.layout.held
    for data in (b"[]", b"{", b'{"agent": {"digest": 5}}', b'{"agent": []}', b"[" * 100_000):
        path.write_bytes(data)
        assert read_held(path) == {}
        assert not path.exists()
        assert path.with_suffix(".unreadable").exists()
    write_held(path, {"agent": Hold("1.0.0", "ab" * 48, 5, 1.5)})
    assert read_held(path)["agent"].since == 1.5


def test_an_agents_wish_does_not_wait_for_an_updater_that_is_held(world: World) -> None:
    node = world.node
    line = Targets(node.kit()).of("updater").line
    held_release = build("1.2.0")
    put(line, held_release)
    line.activate(held_release.name, fallback=node.old.name)
    write_held(node.layout.held, {"updater": Hold("1.2.0", held_release.release.digest, 5, 0.0)})
    world.client.wishes.insert(0, replace(world.client.wishes[0], line="updater"))
    world.loop.round()
    assert line.current() == held_release.name
    assert world.current == node.new.name


# --- orders that outlive their updater


def test_an_order_that_was_accepted_outlives_its_updater(world: World) -> None:
    world.wish(release=world.node.old.release)
    world.push()
    world.again()
    assert world.orders.under_way() == "tx-push"
    assert world.orders.waiting()
    world.loop.round()
    assert world.current == world.node.new.name
    assert not world.node.layout.orders.exists()
    world.orders.order_rollback("agent")
    world.again()
    world.loop.round()
    assert world.current == world.node.old.name
    assert not world.node.layout.orders.exists()
    world.again()
    assert not world.orders.waiting()
    assert [begin.cause for begin in world.begun] == ["push", "rollback"]


def test_an_order_that_was_begun_is_not_begun_again(world: World) -> None:
    world.wish(release=world.node.old.release)
    orders: list[Callable[[], None]] = [world.push, lambda: world.orders.order_rollback("agent")]
    for order in orders:
        order()
        kept = world.node.layout.orders.read_bytes()
        world.loop.round()
        count = len(world.begun)
        world.node.layout.orders.write_bytes(kept)  # killed right after the journal's first record
        world.again()
        assert not world.orders.waiting()
        assert not world.node.layout.orders.exists()
        world.loop.round()
        assert len(world.begun) == count


def test_an_order_that_cannot_be_carried_out_is_not_kept(world: World) -> None:
    world.orders.order_rollback("agent")  # there is nothing to go back to: a release has gone meanwhile
    world.loop.round()
    assert not world.node.layout.orders.exists()
    assert world.begun == []


def test_a_rollback_that_cannot_be_begun_is_not_forgotten(world: World) -> None:
    world.loop.round()
    journal = world.node.layout.journal
    journal.rename(journal.with_name("away"))
    journal.write_text("")
    world.orders.order_rollback("agent")
    world.loop.round()
    assert world.orders.waiting()
    journal.unlink()
    journal.with_name("away").rename(journal)
    world.loop.round()
    assert world.current == world.node.old.name


class Crowded(Orders):
    """Somebody else orders in the very moment in which nothing is under way any more."""

    answers: ClassVar[list[str]] = []

    def end(self) -> None:
        super().end()
        try:
            self.answers.append(self.order_rollback("updater"))
        except InputError as error:
            self.answers.append(error.code)


def test_nobody_comes_between_an_order_and_its_next_try(world: World) -> None:
    """Else one of two orders that were both accepted would be lost."""
    world.loop.round()
    journal = world.node.layout.journal
    journal.rename(journal.with_name("away"))
    journal.write_text("")
    crowded = Crowded(world.orders.lock, world.orders.wake, world.node.layout.orders)
    world.loop.orders = world.loop.driving.orders = world.loop.ordered.orders = crowded
    crowded.order_rollback("agent")
    world.loop.round()
    assert set(crowded.answers) == {"busy"}
    assert crowded.rollback == "agent"


def test_an_order_that_cannot_be_read_is_dropped(world: World) -> None:
    for data in (b"", b"[]", b"{}", b'{"push": {"tx": 5}}', b'{"rollback": {"tx": "tx-1", "line": 7}}'):
        world.node.layout.orders.write_bytes(data)
        world.again()
        assert not world.orders.waiting()
        assert not world.node.layout.orders.exists()
