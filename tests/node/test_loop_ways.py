"""updater.loop: the ways by which a release comes (pull, native, recovery, push), holds, and what is damaged."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from instar.core import held
from instar.core.errors import InputError, MachineError, ServerUnreachable
from instar.core.held import UNHEARD, Hold
from instar.core.journal import Begin
from instar.core.settings import UpdaterSettings
from instar.core.wish import Wanted, Wish, read_wanted
from instar.host import points, trials
from instar.host.incoming import COMPLETE, NEEDED, Incoming
from instar.host.records import read_held, read_quarantine, write_held
from instar.updater.client import ARTIFACTS
from instar.updater.loop import Loop
from instar.updater.orders import Orders, Pushed
from instar.updater.targets import Targets
from tests.node.test_stage_parcel import bring
from tests.node.world import Built, Node, Quiet, build, put

DAY_S = 86_400.0
AWAY = ServerUnreachable("server-unreachable", "no route")


class Client:
    def __init__(self, node: Node) -> None:
        self.wishes: list[Wish] = [Wish("agent", node.new.release, "node/new.tar.gz", 5)]
        self.troubles: list[str] = []
        self.away = False

    def wanted(self, trouble: str = "") -> Wanted:
        if self.away:
            raise AWAY
        self.troubles.append(trouble)
        return Wanted(tuple(self.wishes), 300.0)


class World:
    def __init__(self, node: Node) -> None:
        self.node, self.client, self.follower = node, Client(node), Quiet()
        self.again()
        node.boot()

    def again(self) -> None:
        """The updater was started anew."""
        self.orders = Orders(threading.Lock(), threading.Event(), self.node.layout.orders)
        self.orders.recall({begin.tx for begin in self.begun})
        kit = replace(self.node.kit(), brought=self.orders.brought)
        self.loop = Loop(
            self.node.layout, self.node.clock, Targets(kit), self.client, self.follower,  # type: ignore[arg-type]
            UpdaterSettings(), self.orders,
        )  # fmt: skip

    def wish(self, **changes: object) -> None:
        self.client.wishes = [replace(self.client.wishes[0], **changes)]  # type: ignore[arg-type]

    def push(self, built: Built | None = None, tx: str = "tx-push") -> None:
        release = (built or self.node.new).release
        bring(self.node, built)
        self.orders.order_push(Pushed(tx, "agent", release.version, release.digest, "node/new.tar.gz"))

    @property
    def current(self) -> str:
        return self.node.line.current()

    @property
    def begun(self) -> list[Begin]:
        return [journal.progress.begin for journal in self.node.journals.read_all()]

    def parcels(self) -> int:
        return len(Incoming(self.node.layout.incoming).complete())


def offer(node: Node, built: Built) -> None:
    """The server has `built` from now on."""
    node.new = node.server.offered = built
    node.server.served.data = built.archive
    node.server.sha256 = hashlib.sha256(built.archive).hexdigest()


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


# --- what is current and damaged


def damage(node: Node, name: str) -> None:
    path = node.line.program(name)
    path.chmod(0o644)
    path.write_bytes(bytes(path.stat().st_size))


def test_a_damaged_release_is_put_there_anew(world: World) -> None:
    world.loop.round()
    damage(world.node, world.node.new.name)
    starts = len(world.node.machine.starts)
    world.loop.round()
    assert world.node.line.is_valid(world.current)
    assert (world.current, world.node.line.previous()) == (world.node.new.name, world.node.old.name)
    last = world.node.journals.read_all()[-1].progress
    assert (last.state.value, last.begin.origin) == ("confirmed", world.node.new.name)
    assert world.node.machine.starts[starts:] == [world.node.new.name]
    world.loop.round()
    assert len(world.begun) == 2, "and then it is left alone"


def test_what_runs_from_before_the_damage_is_started_anew_for_the_trial(world: World) -> None:
    world.loop.round()
    damage(world.node, world.node.new.name)
    world.node.record("agent", world.node.new.name)
    restarts: list[str] = []
    machine, restart = world.node.machine, world.node.machine.restart

    def count(role: str) -> None:
        restarts.append(role)
        restart(role)

    machine.restart = count  # type: ignore[method-assign]
    world.loop.round()
    assert restarts == ["agent"]
    assert world.node.journals.read_all()[-1].progress.state.value == "confirmed"


def test_a_damaged_release_whose_server_is_away_goes_on_as_it_is(world: World) -> None:
    world.loop.round()
    damage(world.node, world.node.new.name)
    world.node.record("agent", world.node.new.name)
    world.node.server.fault = MachineError("no-space", "no")
    starts = len(world.node.machine.starts)
    world.loop.round()
    assert world.current == world.node.new.name, "what runs is left alone"
    assert read_quarantine(world.node.layout.quarantine) == {}
    world.node.server.fault = AWAY
    world.node.clock.now += 60
    world.loop.round()
    assert len(world.node.machine.starts) == starts
    other = build("1.2.0")
    world.node.server.fault = None
    offer(world.node, other)
    world.wish(release=other.release, generation=6)
    world.loop.round()
    assert world.current == other.name, "another wish does not wait for the repair"
    assert len(world.node.machine.starts) > starts


def test_one_put_there_anew_that_fails_its_trial_gives_way_to_the_one_before(world: World) -> None:
    world.loop.round()
    damage(world.node, world.node.new.name)
    world.node.machine.running.clear()
    world.node.crashing.add(world.node.new.name)
    world.loop.round()
    assert world.current == world.node.old.name
    assert world.node.machine.running["agent"] == world.node.old.name
    assert len(read_quarantine(world.node.layout.quarantine)) == 1
    assert world.node.line.names() == [world.node.old.name]


@pytest.mark.parametrize("via", ["native", "recovery"])
def test_a_damaged_release_is_fetched_even_where_releases_are_sent(world: World, via: str) -> None:
    world.wish(via="native")
    parcel = bring(world.node)
    world.loop.round()
    Incoming(world.node.layout.incoming).remove(parcel)
    world.wish(via=via)
    damage(world.node, world.node.new.name)
    world.loop.round()
    assert world.node.line.is_valid(world.current)
    assert world.node.server.served.asked == [0]


class Kill(BaseException):
    pass


def test_a_repair_that_is_killed_anywhere_comes_to_its_end(folder: Path) -> None:
    """Killed at each named point, with a restart of the agent right after it: a sound one runs at the end."""
    for arrival in itertools.count(1):
        node = Node(folder / str(arrival))
        world = World(node)
        world.loop.round()
        damage(node, node.new.name)
        left = arrival

        def listen(_: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Kill

        points.listener = listen
        try:
            world.loop.round()
        except Kill:
            pass
        finally:
            points.listener = None
        node.machine.restart("agent")
        assert node.line.is_valid(node.machine.running["agent"]), arrival
        world.again()
        for _ in range(3):
            world.loop.round()
            node.clock.now += 10.0
        assert (node.line.current(), node.machine.running["agent"]) == (node.new.name,) * 2, arrival
        assert node.line.is_valid(node.new.name)
        assert node.journals.unfinished() == []
        assert trials.read(node.line) is None
        node.close()
        if left > 0:
            assert arrival > 20
            return


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


def test_an_order_that_cannot_be_read_is_dropped(world: World) -> None:
    for data in (b"", b"[]", b"{}", b'{"push": {"tx": 5}}', b'{"rollback": {"tx": "tx-1", "line": 7}}'):
        world.node.layout.orders.write_bytes(data)
        world.again()
        assert not world.orders.waiting()
        assert not world.node.layout.orders.exists()
