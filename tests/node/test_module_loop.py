"""updater.loop with modules: they come after the programs, hold nobody up, and go when they are not wanted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instar.core.errors import InputError, InstarError, MachineError, ServerUnreachable
from instar.core.journal import Begin
from instar.core.settings import UpdaterSettings
from instar.core.wish import Wanted, read_wanted
from instar.updater.loop import Loop
from instar.updater.main import _handlers
from instar.updater.orders import Orders
from instar.updater.targets import Targets
from tests.node.modules import LINE, NAME, ModuleNode, build
from tests.node.world import Built, Quiet, put

HEX = "0" * 96


class Client:
    """Says what is wanted, as the server does, or fails. The answer goes through the real reader."""

    def __init__(self) -> None:
        self.lines: dict[str, Any] = {}
        self.fault: InstarError | None = None
        self.generation = 1

    def want(self, line: str, built: Built, target: str) -> None:
        release = built.release
        wish = {"version": release.version, "digest": release.digest, "target": target}
        self.lines[line] = {**wish, "generation": self.generation}

    def wanted(self, trouble: str = "") -> Wanted:
        if self.fault is not None:
            raise self.fault
        return read_wanted({"v": 1, "poll_s": 300.0, "lines": self.lines})


class World:
    def __init__(self, node: ModuleNode) -> None:
        self.node, self.client = node, Client()
        self.orders = Orders(threading.Lock(), threading.Event())
        self.targets, self.follower = Targets(node.kit()), Quiet()
        self.loop = Loop(
            node.layout, node.clock, self.targets, self.client, self.follower, UpdaterSettings(), self.orders  # type: ignore[arg-type]
        )  # fmt: skip
        node.boot()

    def want_module(self, built: Built) -> None:
        self.client.want(LINE, built, f"module/{NAME}-{built.release.version}.tar.gz")
        self.node.server.offer(built)

    def want_agent(self) -> None:
        self.client.want("agent", self.node.new, "node/new.tar.gz")

    def begun(self) -> list[str]:
        return [journal.progress.begin.line for journal in self.node.journals.read_all()]


@pytest.fixture
def world(folder: Path) -> Iterator[World]:
    node = ModuleNode(folder / "state")
    put(node.line, node.new)  # the agent's rehearsal is another test's
    made = World(node)
    yield made
    node.close()


def test_modules_come_after_the_agent(world: World) -> None:
    world.want_module(world.node.first)
    world.want_agent()
    world.loop.round()
    assert world.begun() == ["agent", LINE]
    assert world.node.line.current() == world.node.new.name
    assert world.node.module.current() == world.node.running == world.node.first.name
    assert 270 <= world.loop.round() <= 330


def test_a_modules_trouble_holds_nobody_up(world: World) -> None:
    world.node.server.fault = ServerUnreachable("server-unreachable", "no route")
    world.want_module(world.node.first)
    world.loop.round()
    assert len(world.node.journals.unfinished()) == 1, "it waits, and is open"
    world.want_agent()
    assert world.loop.round() < 300
    assert world.node.line.current() == world.node.new.name
    world.node.server.fault = None
    world.loop.round()
    assert world.node.running == world.node.first.name


def test_what_was_put_off_is_gone_on_with_and_not_begun_beside_it(world: World) -> None:
    world.node.server.fault = ServerUnreachable("server-unreachable", "no route")
    world.want_module(world.node.first)
    for _ in range(3):
        world.loop.round()
        assert world.begun() == [LINE], "two at once would undo each other"
    world.node.server.fault = None
    world.loop.round()
    assert world.begun() == [LINE]
    assert world.node.running == world.node.first.name


def test_a_module_waits_for_what_it_depends_on(world: World) -> None:
    needy = build("1.0.0", depends=["demo.base"])
    world.want_module(needy)
    assert world.loop.round() <= 5.0
    assert world.node.module.current() == ""
    base = build("1.0.0", name="demo.base")
    line = world.targets.of("module/demo.base").line
    line.layout.releases.mkdir(parents=True)
    put(line, base)
    line.activate(base.name, fallback="")
    world.client.want("module/demo.base", base, "module/demo.base-1.0.0.tar.gz")
    world.node.clock.now += 5.1
    world.loop.round()
    assert world.node.running == needy.name, "it was not blamed, and tried again soon"


# --- the end of a wish


def test_a_module_that_is_not_wanted_any_more_is_retired(world: World) -> None:
    world.want_module(world.node.first)
    world.loop.round()
    world.client.lines.clear()
    world.loop.round()
    assert world.node.module.current() == world.node.running == ""
    world.want_module(world.node.second)
    world.loop.round()
    assert world.node.running == world.node.second.name


@pytest.mark.parametrize(
    "fault",
    [
        ServerUnreachable("server-unreachable", "no"),
        InputError("bad-wanted", "odd"),
        MachineError("bad-identity", "no"),
    ],
    ids=lambda fault: fault.code,
)
def test_no_answer_retires_nothing(world: World, fault: InstarError) -> None:
    world.want_module(world.node.first)
    world.loop.round()
    world.client.fault = fault
    world.client.lines.clear()
    for _ in range(3):
        world.loop.round()
    assert world.node.running == world.node.first.name


@pytest.mark.parametrize(
    "line",
    [
        {LINE: None},
        {LINE: {}},
        {LINE: {"version": "1.0.0", "digest": "x", "target": "t", "generation": 1}},
        {LINE: "1.0.0"},
        {"module/../agent": {"version": "1.0.0", "digest": HEX, "target": "t", "generation": 1}},
        {"module/": {"version": "1.0.0", "digest": HEX, "target": "t", "generation": 1}},
        {"module/Upper": {"version": "1.0.0", "digest": HEX, "target": "t", "generation": 1}},
        {
            f"module/m{n}": {"version": "1.0.0", "digest": HEX, "target": "t", "generation": 1}
            for n in range(257)
        },
    ],
    ids=str,
)
def test_an_odd_answer_retires_nothing(world: World, line: dict[str, Any]) -> None:
    world.want_module(world.node.first)
    world.loop.round()
    world.client.lines = line
    world.loop.round()
    assert world.node.running == world.node.first.name
    assert world.begun() == [LINE]


def test_unknown_lines_are_passed_over(world: World) -> None:
    world.want_module(world.node.first)
    world.client.lines |= {"system": {"version": 7}, "": None, "modules/x": []}
    world.loop.round()
    assert world.node.running == world.node.first.name


def test_what_was_fetched_for_jobs_is_no_concern(world: World) -> None:
    """It has no links; and a folder that is none of ours is left alone."""
    line = world.targets.of("module/demo.once").line
    line.layout.releases.mkdir(parents=True)
    once = build("1.0.0", name="demo.once", mode="oneshot")
    put(line, once)
    foreign = world.node.layout.modules / "Not Ours"
    (foreign / "releases").mkdir(parents=True)
    world.loop.round()
    assert line.is_valid(once.name)
    assert foreign.is_dir()
    assert world.node.reloads == []


def test_a_module_given_up_before_its_trial_leaves_nothing(world: World) -> None:
    world.node.server.fault = ServerUnreachable("server-unreachable", "no route")
    world.want_module(world.node.first)
    world.loop.round()
    world.client.lines.clear()
    world.node.server.fault = None
    world.loop.round()
    (journal,) = world.node.journals.read_all()
    assert journal.progress.reason is not None
    assert journal.progress.reason.code == "superseded"
    assert world.node.module.names() == []
    assert world.node.module.current() == ""


def test_a_retirement_is_finished_when_the_agent_can_hear_it(world: World) -> None:
    world.want_module(world.node.first)
    world.loop.round()
    world.client.lines.clear()
    world.node.record("agent", "")
    answer, world.node.said = world.node.said, lambda: b"\n"
    assert world.loop.round() < 300, "soon again"
    assert world.node.running == world.node.first.name
    world.node.said = answer
    world.client.fault = ServerUnreachable("server-unreachable", "no route")
    world.loop.round()
    assert world.node.running == "", "it was decided already, and needs no server"


# --- an operator's word


def test_a_rollback_of_a_module(world: World) -> None:
    handlers = _handlers(world.node.program(), world.targets, world.orders)
    world.want_module(world.node.first)
    world.loop.round()
    with pytest.raises(InputError, match="no valid previous release"):
        handlers["rollback"]({"line": LINE})
    world.want_module(world.node.second)
    world.loop.round()
    assert handlers["rollback"]({"line": LINE})["version"] == "1.0.0"
    world.loop.round()
    assert world.node.running == world.node.first.name
    world.loop.round()
    assert world.node.running == world.node.first.name, "it holds against the wish that it gave up"
    world.client.generation = 2
    world.want_module(world.node.second)
    world.loop.round()
    assert world.node.running == world.node.second.name


@pytest.mark.parametrize("line", ["module/../../etc", "module/", "system", "", 7])
def test_a_rollback_of_no_line(world: World, line: object) -> None:
    handlers = _handlers(world.node.program(), world.targets, world.orders)
    with pytest.raises(InputError):
        handlers["rollback"]({"line": line})


def test_a_journal_of_a_line_that_is_not_known_is_left_alone(world: World) -> None:
    """One that a newer release began, before this one was put back."""
    world.node.journals.begin(Begin("tx-new", "system/slot", "1.0.0", HEX, "t", "", "", "wish"))
    world.want_agent()
    world.loop.round()
    assert world.node.line.current() == world.node.new.name
    assert [j.progress.begin.tx for j in world.node.journals.unfinished()] == ["tx-new"]
