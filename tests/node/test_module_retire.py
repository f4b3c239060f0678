"""The end of a service module, and kills anywhere: while it comes, is replaced, is put back, or goes."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from instar.core.errors import MachineError
from instar.core.journal import Reason
from instar.core.trial import Lease
from instar.engine.driver import drive
from instar.engine.journal import Journals
from instar.host import points, trials
from instar.targets import module_store
from instar.targets.kit import Verdict
from instar.updater.targets import Targets
from instar.updater.tidy import tidy
from tests.node.modules import NAME, ModuleNode, build
from tests.node.test_module_release import Kill, run, settled
from tests.node.world import Quiet, put


@pytest.fixture
def node(folder: Path) -> Iterator[ModuleNode]:
    made = ModuleNode(folder / "state")
    yield made
    made.close()


# --- the end of a module


def test_a_retired_module_is_gone_but_for_its_data(node: ModuleNode) -> None:
    node.install(node.first)
    node.boot()
    data = node.keep()
    node.module_target().retire()
    settled(node, None)
    assert node.module.names() == []
    assert (data / "state.json").exists()
    assert node.reloads == [NAME]
    node.module_target().retire()
    assert node.reloads == [NAME], "doing it again does nothing"


def test_the_data_waits_thirty_days_of_the_machines_own_time(node: ModuleNode) -> None:
    node.install(node.first)
    node.boot()
    data = node.keep()
    target = node.module_target()
    target.retire()
    for _ in range(29):
        node.clock.now += module_store.DAY_S
        target.sweep()
    assert data.is_dir()
    node.clock.reboot()
    target.sweep()
    node.clock.now += module_store.DAY_S / 2
    target.sweep()
    assert data.is_dir(), "a clock that leaps costs nothing; only time that was seen to pass counts"
    node.clock.now += module_store.DAY_S
    target.sweep()
    assert not data.exists()
    assert not node.layout.module(NAME).retired.exists()


def test_a_module_that_is_wanted_again_finds_its_data(node: ModuleNode) -> None:
    node.install(node.first)
    node.boot()
    node.keep()
    node.module_target().retire()
    assert run(node).state.value == "confirmed"
    assert not node.layout.module(NAME).retired.exists()
    node.clock.now += 40 * module_store.DAY_S
    node.module_target().sweep()
    assert (node.layout.module(NAME).data / "state.json").exists()
    settled(node, node.first)


def test_data_of_a_first_release_that_failed_waits_too(node: ModuleNode) -> None:
    node.keep()
    node.falling.add(node.first.name)
    run(node)
    assert module_store.retirement(node.layout.module(NAME)) is not None


def test_an_unreadable_record_keeps_everything(node: ModuleNode) -> None:
    node.boot()
    data = node.keep()
    node.layout.module(NAME).retired.write_bytes(b"{")
    node.module_target().sweep()
    assert data.is_dir()
    assert json.loads(node.layout.module(NAME).retired.read_bytes())["told"] is True


def test_a_retirement_that_the_agent_did_not_hear_of_is_told_at_the_next_round(node: ModuleNode) -> None:
    node.install(node.first)
    node.boot()
    node.record("agent", "")
    answer, node.said = node.said, lambda: b"\n"
    with pytest.raises(MachineError):
        node.module_target().retire()
    assert node.running == node.first.name
    node.said = answer
    node.module_target().sweep()
    settled(node, None)


# --- kills


def kill_at(arrival: int) -> Callable[[str], None]:
    left = arrival

    def listen(_: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Kill

    return listen


CASES = ["first", "first bad", "update", "update bad", "rollback", "retire"]


@pytest.mark.parametrize("again", [0, 3], ids=["once", "twice"])
@pytest.mark.parametrize("case", CASES)
def test_killed_anywhere_it_comes_to_its_end(folder: Path, case: str, again: int) -> None:
    """Killed at each arrival at a named point, and in recovery once more; then as without the kill."""
    for arrival in itertools.count(1):
        node = ModuleNode(folder / str(arrival))
        if case != "first" and case != "first bad":
            node.install(node.first, node.second if case == "rollback" else None)
            node.server.offer(node.second)
        if case.endswith("bad"):
            node.server.verdicts["trial"] = Verdict("fail", Reason("wrong", "it is"))
        do = {"retire": retire, "rollback": go_back}.get(case, go)
        killed = [attempt(node, do, kill_at(number)) for number in (arrival, again) if number]
        attempt(node, do, None)
        old, new = (None if case.startswith("first") else node.first), node.server.offered
        if case == "retire":
            settled(node, None)
        elif case.endswith("bad"):
            settled(node, old, old)
        elif case == "rollback":
            settled(node, node.second, node.first)
        else:
            settled(node, new, old)
        node.close()
        if not killed[0]:
            assert arrival > 4, "there is hardly a point to be killed at"
            return


def attempt(node: ModuleNode, do: Callable[[ModuleNode], None], listen: Callable[[str], None] | None) -> bool:
    """Whether it was killed."""
    points.listener = listen
    try:
        do(node)
    except Kill:
        return True
    finally:
        points.listener = None
    return False


def go(node: ModuleNode) -> None:
    node.boot()
    opened = node.journals.open_all()
    journal = opened[0] if opened else node.begin_module(node.server.offered)
    drive(journal, node.module_target(), Quiet())


def go_back(node: ModuleNode) -> None:
    node.boot()
    opened = node.journals.open_all()
    drive(
        opened[0] if opened else node.begin_module(node.second, cause="rollback"),
        node.module_target(),
        Quiet(),
    )


def retire(node: ModuleNode) -> None:
    node.boot()
    node.module_target().sweep()
    if node.module.current():
        node.module_target().retire()


def test_a_trial_that_lost_its_journal_is_undone_to_nothing(node: ModuleNode) -> None:
    node.install(node.first)
    node.boot()
    lease = Lease(2.0, 20.0, node.clock.boot_id(), node.clock.now)
    trials.write(node.module, trials.Trial("tx-lost", node.first.name, "", 3, lease))
    tidy(node.layout, Journals(node.layout.journal, node.clock), Targets(node.kit()))
    assert node.module.current() == node.running == ""
    assert trials.read(node.module) is None


def test_collecting_keeps_what_a_job_may_use(node: ModuleNode) -> None:
    """A one-shot module has no links: the newest two stay, and what was used today; all of it goes after a month."""
    layout, line = node.layout.module(NAME), node.module
    layout.releases.mkdir(parents=True)
    builts = [build(f"1.{n}.0") for n in range(4)]
    now = 2_000_000_000.0
    for age, built in zip((40.0, 0.5, 40.0, 20.0), builts, strict=True):
        put(line, built)
        then = now - age * module_store.DAY_S
        os.utime(line.folder(built.name), (then, then))
    module_store.collect(line, layout, now)
    assert line.names() == [built.name for built in builts[1:]]
    module_store.collect(line, layout, now + 10.5 * module_store.DAY_S)
    assert line.names() == [built.name for built in builts[2:]], "used today no more"
    module_store.collect(line, layout, now + 11 * module_store.DAY_S)
    assert line.names() == []
