"""Tells the server what the journals say, apart from the transaction: a report that fails decides nothing.

A thread of its own with a connection of its own. What was told is kept in `<tx>.reported`, only to
save traffic: the server stores each event once, by its id.
"""

from __future__ import annotations

import contextlib
import random
import threading
from pathlib import Path
from typing import Any

from instar.core.backoff import Backoff
from instar.core.errors import InstarError
from instar.core.journal import Progress, timeline
from instar.core.releases import version_of
from instar.engine.journal import Journal, Journals
from instar.updater.client import ServerClient

MOST_EVENTS = 100  # in one request


class Reporter:
    """Implements `instar.engine.driver.Follower`."""

    def __init__(self, client: ServerClient, journals: Journals, floor_s: float, cap_s: float) -> None:
        self._client, self._journals = client, journals
        self._backoff = Backoff(floor_s, 2.0, cap_s)
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, wait_s: float) -> None:
        """Let it send what there is, for at most `wait_s`."""
        self._stopping = True
        self._wake.set()
        self._thread.join(wait_s)

    def changed(self, progress: Progress) -> None:
        self._wake.set()

    def _run(self) -> None:
        wait: float | None = 0.0
        while True:
            self._wake.wait(wait)
            self._wake.clear()
            stopping = self._stopping  # before the look: what there was when we were told to stop is sent
            try:
                self._send_all()
                self._backoff.reset()
                wait = None
            except InstarError:
                wait = self._backoff.next(random.random())
            if stopping:
                return

    def _send_all(self) -> None:
        for journal in self._journals.read_all():
            mark = journal.path.with_suffix(".reported")
            told = _told(mark)
            events = [e for e in events_of(journal) if int(e["id"].rpartition(":")[2]) > told]
            for start in range(0, len(events), MOST_EVENTS):
                part = events[start : start + MOST_EVENTS]
                stored = self._client.report(part)
                if not stored.issuperset(e["id"] for e in part):
                    continue  # not all: told again next time
                mark.write_text(part[-1]["id"].rpartition(":")[2])


def events_of(journal: Journal) -> list[dict[str, Any]]:
    """The journal's changes of state as the events of docs/protocol.md."""
    begin = journal.progress.begin
    return [
        {
            "id": f"{begin.tx}:{change.number}",
            "tx": begin.tx,
            "line": begin.line,
            "phase": change.state.value,
            "version": begin.version,
            "digest": begin.digest,
            "from_version": version_of(begin.origin) if begin.origin else "",
            "reason": {
                "code": change.reason.code if change.reason else "",
                "text": change.reason.text if change.reason else "",
            },
            "wall": change.at.wall,
            "boot_id": change.at.boot_id,
        }
        for change in timeline(journal.records)
    ]


def _told(mark: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(mark.read_text())
    return -1
