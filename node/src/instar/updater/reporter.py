"""Tells the server what the journals say, and of the system's slots, apart from the transaction: a report that
fails decides nothing.

A thread of its own with a connection of its own. What was told is kept in `<tx>.reported`, only to
save traffic: the server stores each event once, by its id.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instar.core.backoff import Backoff
from instar.core.errors import InstarError, MachineError, ServerUnreachable
from instar.core.journal import Progress, timeline
from instar.core.releases import version_of
from instar.core.system import LINE as SYSTEM
from instar.engine.journal import Journal, Journals
from instar.updater.client import ServerClient

MOST_EVENTS = 100  # in one request
SYSTEM_EVERY_S = 1.0  # while bytes of an image come

log = logging.getLogger("instar.updater")

Report = Callable[[], dict[str, Any]]


class Reporter:
    """Implements `instar.engine.driver.Follower`. `system` makes the word about the slots; None for nothing to say."""

    def __init__(
        self,
        client: ServerClient,
        journals: Journals,
        floor_s: float,
        cap_s: float,
        system: Report | None = None,
    ) -> None:
        self._client, self._journals, self._system = client, journals, system
        self._backoff = Backoff(floor_s, 2.0, cap_s)
        self._wake = threading.Event()
        self._stopping = False
        self._events_due, self._system_due = True, False
        self._system_from = -math.inf  # monotonic time before which nothing is said of the slots
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, wait_s: float) -> None:
        """Let it send what there is, for at most `wait_s`."""
        self._stopping = True
        self._wake.set()
        self._thread.join(wait_s)

    def changed(self, progress: Progress) -> None:
        self._events_due = True
        if progress.begin.line == SYSTEM:
            self.system_changed(at_once=True)
        self._wake.set()

    def system_changed(self, at_once: bool = False) -> None:
        """There is more to say of the slots; `at_once`, or as soon as the last word is old enough. Must not wait."""
        if at_once:
            self._system_from = -math.inf
        if self._system is not None and (at_once or not self._system_due):
            self._system_due = True
            self._wake.set()

    def _run(self) -> None:
        wait: float | None = 0.0
        while True:
            self._wake.wait(wait)
            self._wake.clear()
            stopping = self._stopping  # before the look: what there was when we were told to stop is sent
            try:
                self._send_events()
                wait = self._send_system(stopping)
                self._backoff.reset()
            except (InstarError, OSError):
                wait = self._backoff.next(random.random())
            if stopping:
                return

    def _send_events(self) -> None:
        if not self._events_due:
            return
        self._events_due = False  # before the look: what changes meanwhile is looked at again
        try:
            self._send_all()
        except (InstarError, OSError):
            self._events_due = True
            raise

    def _send_system(self, stopping: bool) -> float | None:
        """Seconds until there is more to send; None for nothing. Raises ServerUnreachable, and MachineError or OSError
        where the machine cannot be looked at: to be sent again."""
        if self._system is None or not self._system_due:
            return None
        left_s = self._system_from - time.monotonic()
        if left_s > 0 and not stopping:
            return left_s
        self._system_due, self._system_from = False, time.monotonic() + SYSTEM_EVERY_S
        try:
            self._client.tell_system(self._system())
        except (ServerUnreachable, MachineError, OSError):
            self._system_due = True
            raise
        except InstarError as error:  # a server that does not know this call: no use to say it again
            log.info("the server does not take the word about the slots: %s", error.text)
        return None

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
                with contextlib.suppress(OSError):  # a full disk: it is told once more some day
                    mark.write_text(part[-1]["id"].rpartition(":")[2])


def events_of(journal: Journal) -> list[dict[str, Any]]:
    """The journal's changes of state as the events of docs/protocol.md."""
    begin, data = journal.progress.begin, journal.progress.data
    # Of a system image: where it goes, and how it is activated, which may not be how that was wished for.
    placed = {"slot": data.get("slot", ""), "mode": data.get("mode", begin.mode)} if begin.mode else {}
    return [
        {
            "id": f"{begin.tx}:{change.number}",
            "tx": begin.tx,
            "line": begin.line,
            "phase": change.state.value,
            "version": begin.version,
            "digest": begin.digest,
            "generation": begin.generation,
            "from_version": version_of(begin.origin) if begin.origin else "",
            "reason": {
                "code": change.reason.code if change.reason else "",
                "text": change.reason.text if change.reason else "",
            },
            "wall": change.at.wall,
            "boot_id": change.at.boot_id,
            **placed,
        }
        for change in timeline(journal.records)
    ]


def _told(mark: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(mark.read_text())
    return -1
