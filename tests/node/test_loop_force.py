"""updater.loop: a node with `[native] mode = "force"` takes the release that it has, once for each wish."""

from __future__ import annotations

import hashlib
import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest

from instar.core.journal import Reason
from instar.core.transaction import Event, Step
from instar.host import points, trials
from instar.host.records import read_quarantine
from tests.node.looping import World
from tests.node.test_stage_parcel import bring
from tests.node.world import Node, manifest, member, tar_gz


@pytest.fixture
def world(node: Node) -> World:
    """At the wanted release since wish 5, and forced."""
    made = World(node)
    made.loop.round()
    assert made.current == node.new.name
    made.wish(via="native", generation=6)
    mode(made, "force")
    node.server.served.asked.clear()
    return made


def mode(world: World, word: str) -> None:
    world.node.layout.config.write_text(f'[native]\nmode = "{word}"\n')


def inodes(world: World) -> dict[str, int]:
    folder = world.node.line.folder(world.current)
    names = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_ino for path in names}


def keep(world: World) -> list[int]:
    """Hold the files open, so that their inodes are given to no other."""
    folder = world.node.line.folder(world.current)
    return [os.open(path, os.O_RDONLY) for path in folder.rglob("*") if path.is_file()]


def test_it_is_put_there_from_the_parcel_and_started_anew_on_trial(world: World) -> None:
    node, before, held = world.node, inodes(world), keep(world)
    starts = len(node.machine.starts)
    parcel = bring(node)
    world.loop.round()
    begin = world.begun[-1]
    assert (begin.generation, begin.via, begin.origin) == (6, "native", node.new.name)
    last = node.journals.read_all()[-1].progress
    assert last.state.value == "confirmed", last.reason
    assert node.server.served.asked == [], "nothing was fetched"
    assert node.server.metadata == [None, parcel.metadata]
    after = inodes(world)
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before), "each file came from the parcel"
    assert node.line.is_valid(world.current)
    assert node.machine.starts[starts:] == [node.new.name]
    assert node.line.previous() == node.old.name
    for descriptor in held:
        os.close(descriptor)


def test_it_is_done_once_for_each_wish(world: World) -> None:
    bring(world.node)
    world.loop.round()
    assert len(world.begun) == 2
    bring(world.node)
    for _ in range(2):
        world.again()
        world.loop.round()
    assert len(world.begun) == 2
    world.wish(generation=7)
    world.loop.round()
    assert [begin.generation for begin in world.begun] == [5, 6, 7]


def test_the_wish_by_which_it_came_forces_nothing(world: World) -> None:
    world.wish(generation=5)
    bring(world.node)
    world.loop.round()
    assert len(world.begun) == 1


@pytest.mark.parametrize("word", ["auto", "never", "nonsense"])
def test_in_another_mode_it_is_left_alone(world: World, word: str) -> None:
    mode(world, word)
    bring(world.node)
    world.loop.round()
    assert len(world.begun) == 1


@pytest.mark.parametrize("via", ["", "recovery"])
def test_only_what_comes_through_the_channel_is_forced(world: World, via: str) -> None:
    world.wish(via=via)
    bring(world.node)
    world.loop.round()
    assert len(world.begun) == 1


def test_without_a_parcel_nothing_is_begun(world: World) -> None:
    assert 270 <= world.loop.round() <= 330
    assert len(world.begun) == 1
    assert world.node.server.served.asked == []


def test_what_is_damaged_is_not_left_for_want_of_a_parcel(world: World) -> None:
    path = world.node.line.program(world.current)
    path.chmod(0o644)
    path.write_bytes(bytes(path.stat().st_size))
    world.loop.round()
    assert world.node.line.is_valid(world.current)
    assert world.node.server.served.asked == [0]


def test_one_that_is_damaged_and_forced_comes_from_the_parcel(world: World) -> None:
    path = world.node.line.program(world.current)
    path.chmod(0o644)
    path.write_bytes(bytes(path.stat().st_size))
    bring(world.node)
    world.loop.round()
    assert world.node.line.is_valid(world.current)
    assert world.node.server.served.asked == []
    assert world.node.journals.read_all()[-1].progress.state.value == "confirmed"


def test_a_parcel_that_is_not_signed_changes_nothing(world: World) -> None:
    bring(world.node, archive=world.node.new.archive + b"x")
    before = inodes(world)
    world.loop.round()
    last = world.node.journals.read_all()[-1].progress
    assert last.reason is not None
    assert (last.state.value, last.reason.code) == ("reverted", "altered-parcel")
    assert (world.current, inodes(world)) == (world.node.new.name, before)
    assert read_quarantine(world.node.layout.quarantine) == {}


def test_another_manifest_for_the_same_program_changes_nothing(world: World) -> None:
    """It could not take the place of the one that is there file by file."""
    node, release = world.node, world.node.new.release
    files = {"instar.pyz": node.new.files["instar.pyz"]}
    said = manifest(files, release.version, release.digest)
    archive = tar_gz([member("manifest.json", said), *(member(p, b) for p, b in files.items())])
    node.server.offered = replace(node.new, archive=archive)
    node.server.sha256 = hashlib.sha256(archive).hexdigest()
    node.server.served.data = archive
    before = inodes(world)
    bring(node, archive=archive)
    world.loop.round()
    last = node.journals.read_all()[-1].progress
    assert last.reason is not None
    assert (last.state.value, last.reason.code) == ("reverted", "other-manifest")
    assert (world.current, inodes(world)) == (node.new.name, before)
    assert node.line.is_valid(world.current)
    assert read_quarantine(node.layout.quarantine) == {}


def test_one_that_fails_its_trial_gives_way_to_the_one_before(world: World) -> None:
    world.node.crashing.add(world.node.new.name)
    bring(world.node)
    world.loop.round()
    assert world.current == world.node.old.name
    assert world.node.machine.running["agent"] == world.node.old.name


def test_the_journal_of_the_last_wish_outlives_many_others(world: World) -> None:
    bring(world.node)
    world.loop.round()
    other = replace(world.begun[-1], line="module/x", generation=1)
    for number in range(60):
        world.node.clock.now += 1.0
        journal = world.node.journals.begin(replace(other, tx=f"tx-m{number}"))
        journal.intent(Step.STAGE)
        journal.outcome(Step.STAGE, Event.FAILED, Reason("x", "y"), {"blame": False})
        journal.intent(Step.REVERT)
        journal.outcome(Step.REVERT, Event.DONE, None, {})
    world.loop.round()
    assert len(world.begun) == 51
    bring(world.node)
    world.loop.round()
    assert len(world.begun) == 51, "wish 6 was done"


class Kill(BaseException):
    pass


def test_killed_anywhere_a_sound_release_is_there_and_it_comes_to_its_end(folder: Path) -> None:
    for arrival in itertools.count(1):
        node = Node(folder / str(arrival))
        world = World(node)
        world.loop.round()
        world.wish(via="native", generation=6)
        mode(world, "force")
        bring(node)
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
        assert node.line.is_valid(node.new.name), arrival
        node.machine.restart("agent")
        assert node.machine.running["agent"] == node.new.name, arrival
        world.again()
        for _ in range(3):
            world.loop.round()
            node.clock.now += 10.0
        assert (node.line.current(), node.machine.running["agent"]) == (node.new.name,) * 2, arrival
        assert [begin.generation for begin in world.begun] == [5, 6], arrival
        assert {j.progress.state.value for j in node.journals.read_all()} == {"confirmed"}
        assert trials.read(node.line) is None
        assert list(node.layout.staging.iterdir()) == []
        node.close()
        if left > 0:
            assert arrival > 20
            return
