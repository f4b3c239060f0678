"""updater.loop: a release that is current and damaged is put there anew."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from instar.core.errors import MachineError
from instar.host import points, trials
from instar.host.incoming import Incoming
from instar.host.records import read_quarantine
from tests.node.looping import AWAY, World, offer
from tests.node.test_stage_parcel import bring
from tests.node.world import Node, build


@pytest.fixture
def world(node: Node) -> World:
    return World(node)


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
