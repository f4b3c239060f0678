"""updater.loop: what is begun, what is waited for, and what an operator's word changes."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from instar.core.errors import MachineError
from instar.core.settings import UpdaterSettings
from instar.core.wish import Wanted, Wish
from instar.updater.loop import Loop
from instar.updater.orders import Orders
from instar.updater.targets import Targets
from tests.node.world import Node, Quiet


class Client:
    """Wants one release for the agent."""

    def __init__(self, node: Node) -> None:
        self.wish = Wish("agent", node.new.release, "node/new.tar.gz", 1)
        self.troubles: list[str] = []

    def wanted(self, trouble: str = "") -> Wanted:
        self.troubles.append(trouble)
        return Wanted((self.wish,), 300.0)


class World:
    def __init__(self, node: Node) -> None:
        self.node, self.client = node, Client(node)
        self.orders = Orders(threading.Lock(), threading.Event())
        targets = Targets(node.kit())
        self.loop = Loop(
            node.layout, node.clock, targets, self.client, Quiet(), UpdaterSettings(), self.orders  # type: ignore[arg-type]
        )  # fmt: skip
        node.boot()

    def begun(self) -> int:
        return len(self.node.journals.read_all())


@pytest.fixture
def world(node: Node) -> World:
    return World(node)


def test_a_wish_is_fulfilled_once(world: World) -> None:
    world.loop.round()
    assert world.node.line.current() == world.node.new.name
    assert 270 <= world.loop.round() <= 330
    assert world.begun() == 1


def test_a_blameless_failure_is_tried_again_later_and_each_time_later(world: World) -> None:
    world.node.server.fault = MachineError("no-space", "no")
    for number, wait_s in enumerate((5.0, 10.0, 20.0), start=1):
        world.loop.round()
        assert world.begun() == number
        assert world.loop.round() <= wait_s, "it does not wait for the next poll"
        assert world.begun() == number, "tried again at once"
        world.node.clock.now += wait_s + 0.1
    world.node.server.fault = None
    world.loop.round()
    assert world.node.line.current() == world.node.new.name


def test_a_newer_wish_need_not_wait(world: World) -> None:
    world.node.server.fault = MachineError("no-space", "no")
    world.loop.round()
    world.node.server.fault = None
    world.client.wish = replace(world.client.wish, generation=2)
    world.loop.round()
    assert world.node.line.current() == world.node.new.name


def test_a_release_that_failed_is_kept_out_until_it_is_wished_for_anew(world: World) -> None:
    world.node.crashing.add(world.node.new.name)
    world.loop.round()
    world.node.crashing.clear()
    world.node.clock.now += 1000.0
    world.loop.round()
    assert world.begun() == 1
    world.client.wish = replace(world.client.wish, generation=2)
    world.loop.round()
    assert world.node.line.current() == world.node.new.name


def test_a_rollback_holds_against_the_wish_that_it_gave_up(world: World) -> None:
    world.loop.round()
    world.orders.rollback = "agent"
    assert world.loop.wait(0.0), "an order counts, also when nobody woke the loop"
    world.loop.round()
    assert world.node.line.current() == world.node.old.name
    world.loop.round()
    assert world.node.line.current() == world.node.old.name
