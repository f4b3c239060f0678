"""Orders through the API of a real server, as an operator's program gives them, and how long each took."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

from instar.core.errors import InstarError, MachineError
from instar_lab.fleet import Fleet
from instar_lab.server import LabServer
from instar_server.ctl.client import Client

WAIT_S = 30.0
MODULES = Path(__file__).parent / "modules"


def job(api: Client, module: str, select: dict[str, Any], n: int = 0) -> dict[str, Any]:
    """The order, when all its rows have ended. Raises MachineError when one is not done."""
    order: dict[str, Any] = api.post(
        "/jobs", {"module": module, "args": {"n": n}, "select": select, "wait_s": WAIT_S}
    )
    bad = [row for row in order["rows"] if row["state"] != "done"]
    if bad or order["open"]:
        row = bad[0]
        text = f"cannot measure: expected every row of {module} done, got {row['state']} {row['code']} {row['text']}"
        raise MachineError("job-failed", text)
    return order


def seconds(api: Client, module: str, select: dict[str, Any], count: int) -> list[float]:
    """How long each of `count` jobs took, one after the other, from the API call to its answer."""
    return [whole for whole, _ in both(api, module, select, count)]


def both(api: Client, module: str, select: dict[str, Any], count: int) -> list[tuple[float, float]]:
    """Of each of `count` jobs, one after the other, two times in seconds: from the API call to its answer; and
    server → node → runner → server, from the order as it goes into the database (`sent_at`) to the result as
    it has come back (`ended_at`), by the server's own clock."""
    taken = []
    for n in range(count):
        began = time.perf_counter()
        order = job(api, module, select, n)
        whole = time.perf_counter() - began
        taken.append((whole, max(row["ended_at"] - row["sent_at"] for row in order["rows"])))
        if module != "bench.service" and any(row["reply"] != {"n": n} for row in order["rows"]):
            raise MachineError("wrong-reply", f"cannot measure: {module} gave back another number than {n}")
    return taken


def p99(values: list[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


def publish(fleet: Fleet, *names: str) -> None:
    """Build and publish modules of bench/modules."""
    for name in names:
        fleet.server.publish_module(MODULES / name)


@dataclass(slots=True)
class Asking:
    """Orders one job after the other, each as soon as the last one has ended; a context manager.

    `ends` holds when each one that was done ended, `lost` what became of the others.
    """

    server: LabServer
    module: str
    node: str
    ends: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Asking:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join(WAIT_S + 5.0)

    def _run(self) -> None:
        with Client(self.server.access) as api:
            while not self._stop.is_set():
                try:
                    job(api, self.module, {"nodes": [self.node]})
                    self.ends.append(time.perf_counter())
                except InstarError as error:
                    self.lost.append(error.text)

    def wait_for(self, count: int, within_s: float = WAIT_S) -> None:
        """Until `count` more jobs are done. Raises MachineError."""
        wanted, deadline = len(self.ends) + count, time.monotonic() + within_s
        while len(self.ends) < wanted:
            if time.monotonic() >= deadline:
                last = self.lost[-1] if self.lost else "no word about why"
                raise MachineError(
                    "too-late", f"cannot measure: expected {count} more jobs to be done: {last}"
                )
            time.sleep(0.002)

    def longest_gap(self, since: float) -> float:
        """Seconds between two answers, from the last one before `since` on."""
        before = max((end for end in self.ends if end < since), default=since)
        times = [before, *(end for end in self.ends if end >= since)]
        return max((later - sooner for sooner, later in pairwise(times)), default=0.0)
