"""The reporter tells the server all that the journals say, also what was written just before it is stopped."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from instar.core.journal import Begin
from instar.core.transaction import Event, Step
from instar.engine.journal import Journals
from instar.host.clock import Clock
from instar.updater.reporter import Reporter

WITHIN_S = 60.0


class Server:
    """Stores what it is told; the first answer waits until it is let go."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.asked, self.go = threading.Event(), threading.Event()

    def report(self, events: list[dict[str, Any]]) -> set[str]:
        self.told += [event["phase"] for event in events]
        self.asked.set()
        assert self.go.wait(WITHIN_S)
        return {event["id"] for event in events}


def test_what_is_written_while_it_tells_is_told_before_it_stops(tmp_path: Path) -> None:
    journals, server = Journals(tmp_path, Clock()), Server()
    journal = journals.begin(Begin("tx-1", "agent", "1.1.0", "ab" * 48, "node/x", "1.0.0-aa", "", "wish"))
    reporter = Reporter(server, journals, 0.1, 1.0)  # type: ignore[arg-type]
    reporter.start()
    assert server.asked.wait(WITHIN_S)
    journal.intent(Step.STAGE)  # while the first word is on its way
    journal.outcome(Step.STAGE, Event.DONE, None, {})
    reporter.changed(journal.progress)
    threading.Timer(0.05, server.go.set).start()
    reporter.stop(WITHIN_S)
    assert server.told == ["offered", "staged"]
