"""How long a role of a node is away: its local API is asked without a pause, by a thread of its own."""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ASK = b'{"v":1,"do":"health"}\n'
ANSWER_S = 1.0
ASK_EVERY_S, CONNECT_EVERY_S = 0.001, 0.002


@dataclass(slots=True)
class Listener:
    """A context manager. `path` is the role's socket; it need not be there.

    `first` and `last` say of each program digest when it answered first and last, in unix time.
    """

    path: Path
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Listener:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join(5.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._talk()
            except (OSError, ValueError, KeyError):
                self._stop.wait(CONNECT_EVERY_S)

    def _talk(self) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_S)
            connection.connect(str(self.path))
            lines = connection.makefile("rb")
            while not self._stop.is_set():
                connection.sendall(ASK)
                line = lines.readline()
                if not line:
                    return
                digest, now = json.loads(line)["digest"], time.time()
                self.first.setdefault(digest, now)
                self.last[digest] = now
                self._stop.wait(ASK_EVERY_S)
