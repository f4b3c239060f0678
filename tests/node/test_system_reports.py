"""The word about the slots: at each change of step, at most once a second while bytes come, and it decides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from instar.core.errors import InstarError, ServerRefused, ServerUnreachable
from instar.core.journal import Begin
from instar.core.transaction import Event, Step
from instar.engine.journal import Journal, Journals
from instar.host.clock import Clock
from instar.updater.reporter import Reporter

WITHIN_S = 60.0


class Server:
    """Takes all, unless `fault` is set."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.told: list[tuple[float, Any]] = []
        self.asked = 0
        self.fault: InstarError | None = None

    def report(self, events: list[dict[str, Any]]) -> set[str]:
        self.events += events
        return {event["id"] for event in events}

    def tell_system(self, body: dict[str, Any]) -> None:
        self.asked += 1
        if self.fault is not None:
            raise self.fault
        self.told.append((time.monotonic(), body["update"]))


class World:
    def __init__(self, folder: Path) -> None:
        self.server, self.journals, self.done = Server(), Journals(folder, Clock()), 0
        self.reporter = Reporter(
            self.server, self.journals, 0.05, 0.1, lambda: {"update": self.done}  # type: ignore[arg-type]
        )  # fmt: skip

    def begin(self) -> Journal:
        begin = Begin("tx-1", "os", "1.1.0", "ab" * 48, "os/x", "", "", "wish", 7, mode="none")
        return self.journals.begin(begin)

    def until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + WITHIN_S
        while not true():
            assert time.monotonic() < end, (self.server.told, self.server.asked)
            time.sleep(0.01)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.reporter.stop(WITHIN_S)


def test_bytes_are_told_once_a_second_and_the_last_of_them_too(world: World) -> None:
    world.reporter.start()
    began = time.monotonic()
    while len(world.server.told) < 3:
        assert time.monotonic() < began + WITHIN_S
        world.done += 1
        world.reporter.system_changed()
        time.sleep(0.005)
    last = world.done
    world.until(lambda: world.server.told[-1][1] == last)
    told = [at for at, _ in world.server.told]
    # From the start on, for a thread may be kept waiting between its look at the clock and its word.
    assert all(at - began >= 1.0 * number for number, at in enumerate(told)), told
    values = [value for _, value in world.server.told]
    assert values == sorted(values)


def test_change_of_step_is_told_at_once_with_its_event_and_generation(world: World) -> None:
    world.reporter.start()
    journal = world.begin()
    began = time.monotonic()
    for step in (Step.STAGE, Step.VERIFY):
        journal.intent(step)
        journal.outcome(step, Event.DONE, None, {})
        for _ in range(10):  # 19 s, if each waited for the one before it to be old enough
            before = len(world.server.told)
            world.reporter.changed(journal.progress)
            world.until(lambda before=before: len(world.server.told) > before)  # type: ignore[misc]
    assert time.monotonic() - began < 15.0
    assert [(e["line"], e["phase"], e["generation"]) for e in world.server.events][-1] == (
        "os",
        "verified",
        7,
    )


def test_report_that_does_not_get_through_holds_no_event_up_and_is_sent_again(world: World) -> None:
    world.server.fault = ServerUnreachable("server-unreachable", "no route")
    journal = world.begin()
    world.reporter.system_changed()
    world.reporter.start()
    world.until(lambda: world.server.asked >= 2)
    assert [event["phase"] for event in world.server.events] == ["offered"]
    journal.intent(Step.STAGE)
    journal.outcome(Step.STAGE, Event.DONE, None, {})
    world.reporter.changed(journal.progress)
    world.until(lambda: len(world.server.events) == 2)
    world.server.fault = None
    world.until(lambda: len(world.server.told) > 0)


def test_server_that_does_not_know_the_call_is_not_asked_again_until_something_changes(world: World) -> None:
    world.server.fault = ServerRefused("not-found", "no such call")
    world.reporter.system_changed()
    world.reporter.start()
    world.until(lambda: world.server.asked == 1)
    time.sleep(0.5)
    assert world.server.asked == 1
    world.reporter.changed(world.begin().progress)
    world.until(lambda: world.server.asked == 2)


def test_node_without_slots_tells_nothing_of_them(tmp_path: Path) -> None:
    world = World(tmp_path)
    reporter = Reporter(world.server, world.journals, 0.05, 0.1)  # type: ignore[arg-type]
    reporter.system_changed(at_once=True)
    reporter.start()
    reporter.changed(world.begin().progress)
    reporter.stop(WITHIN_S)
    assert world.server.asked == 0
    assert world.server.events
