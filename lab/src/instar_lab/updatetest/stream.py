"""What the server says happens, as it happens, and the means to catch up on what was missed."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any, NamedTuple

from instar.core.errors import InstarError, MachineError
from instar_server.ctl.client import Access, Client

OPEN_S = 30.0
LASTS_S = 3600.0  # as long as the server keeps one open
AGAIN_S = 0.2


class Heard(NamedTuple):
    """One thing that happened; `at` is unix time when it was heard here."""

    at: float
    body: dict[str, Any]


class Stream:
    """A context manager. Nothing that happens after it was entered is missed while its connection lasts.

    The server closes it now and then; it is opened again, and what came in between must be asked for.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._heard: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        self._stop = threading.Event()

    def __enter__(self) -> Stream:
        self.follow("/stream")
        return self

    def __exit__(self, *_: object) -> None:
        """The threads end with the server, or with this process."""
        self._stop.set()

    def follow(self, path: str) -> None:
        """Hear what is told there, too. Raises MachineError when it cannot be had."""
        opened = threading.Event()
        threading.Thread(target=self._run, args=(path, opened), name=f"stream {path}", daemon=True).start()
        if not opened.wait(OPEN_S):
            raise MachineError("no-stream", f"cannot hear the server: no {path} within {OPEN_S:g} s")

    def next(self, within_s: float) -> Heard | None:
        """The next thing that was heard; None when there was nothing for so long."""
        try:
            return self._heard.get(timeout=max(0.0, within_s))
        except queue.Empty:
            return None

    def _run(self, path: str, opened: threading.Event) -> None:
        while not self._stop.is_set():
            try:
                with Client(self._access) as client:
                    for body in client.events(path, for_s=LASTS_S):
                        opened.set()
                        if body is not None:
                            self._heard.put(Heard(time.time(), body))
            except InstarError:
                self._stop.wait(AGAIN_S)
