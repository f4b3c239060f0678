"""A disk that answers with an error ends no report: the word comes later, and says what is wrong."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instar.core.journal import Begin
from instar.core.wish import Wanted
from instar.engine.journal import Journals
from instar.host.clock import Clock
from instar.updater.orders import Orders
from instar.updater.reporter import Reporter
from instar.updater.system import System as Line
from tests.node.slots.images import Image
from tests.node.slots.system import System

WITHIN_S = 60.0
BROKEN = OSError(errno.EIO, os.strerror(errno.EIO))


class Server:
    def __init__(self) -> None:
        self.events: list[str] = []
        self.told = threading.Event()

    def report(self, events: list[dict[str, Any]]) -> set[str]:
        self.events += [event["id"] for event in events]
        return {event["id"] for event in events}

    def tell_system(self, body: dict[str, Any]) -> None:
        self.told.set()


@pytest.fixture
def journals(tmp_path: Path) -> Journals:
    made = Journals(tmp_path, Clock())
    made.begin(Begin("tx-1", "os", "1.1.0", "ab" * 48, "os/x", "", "", "wish", 7, mode="none"))
    return made


def test_a_fault_of_the_disk_is_waited_out(journals: Journals) -> None:
    server, faults = Server(), [BROKEN, BROKEN]

    def say() -> dict[str, Any]:
        if faults:
            raise faults.pop()
        return {}

    reporter = Reporter(server, journals, 0.05, 0.1, say)  # type: ignore[arg-type]
    reporter.system_changed()
    reporter.start()
    try:
        assert server.told.wait(WITHIN_S)
    finally:
        reporter.stop(WITHIN_S)
    assert server.events == ["tx-1:0"]


def test_what_was_told_and_cannot_be_noted_holds_up_no_other_word(journals: Journals, tmp_path: Path) -> None:
    (tmp_path / "tx-1.reported").mkdir()
    server = Server()
    reporter = Reporter(server, journals, 0.05, 0.1, dict)  # type: ignore[arg-type]
    reporter.system_changed()
    reporter.start()
    try:
        assert server.told.wait(WITHIN_S)
        time.sleep(0.3)
    finally:
        reporter.stop(WITHIN_S)
    assert server.events == ["tx-1:0"], "nor is it told again and again"


@pytest.fixture
def system(memory: Path, tmp_path: Path) -> Iterator[System]:
    made = System(memory / "s", Image(tmp_path, "1.0.0", 2), Image(tmp_path, "1.1.0", 3))
    made.power_on()
    yield made
    made.close()


def test_the_word_about_the_slots_says_what_cannot_be_looked_at(system: System) -> None:
    target = system.target()
    orders = Orders(threading.Lock(), threading.Event())
    line = Line(
        target.kit, system.journals, orders, lambda: target.platform, lambda: Wanted((), 300.0), lambda: None
    )
    line.start()
    assert line.report()["error"] is None

    def broken() -> Any:
        raise BROKEN

    target.platform.boot.state = broken  # type: ignore[method-assign]
    said = line.report()
    assert (said["error"]["code"], said["slots"]["a"]["version"], said["boot"]) == ("machine", "1.0.0", {})
    assert os.strerror(errno.EIO) in said["error"]["text"]
