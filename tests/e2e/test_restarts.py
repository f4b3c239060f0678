"""Restarts while jobs arrive: no job is lost, none runs twice, nothing leaks (W2, W6, issue 3).

The short run has 24 restarts and belongs to the quick tests; `make soak` does 200.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from instar.core.errors import InstarError
from instar_lab import machine
from instar_lab.node import Node
from instar_server.ctl.client import Client
from tests.e2e import orders
from tests.e2e.conftest import Hall, Stage, cli, health
from tests.e2e.orders import FINAL, MODULES, job, modules, row, runs, want_module

EVERY_S = 0.05
SPARE_DESCRIPTORS = 6  # a connection and a job may be under way when they are counted
CLEAN = ("module", "all", "agent", "local")
KILLS = ("kill-module", "kill-agent")


class Orders(threading.Thread):
    """Orders a job every 50 ms: in turns one that writes a line, and a question to the service module."""

    def __init__(self, server: Any, node: Node, file: Path) -> None:
        super().__init__(name="orders", daemon=True)
        self._server, self._node, self._file = server, node.id, file
        self._over = threading.Event()
        self.made: list[tuple[str, str]] = []
        self.fault: InstarError | None = None

    def run(self) -> None:
        try:
            with Client(self._server.access) as api:
                self._order(api)
        except InstarError as error:
            self.fault = error

    def _order(self, api: Client) -> None:
        number = 0
        due = time.monotonic()
        while not self._over.is_set():
            number += 1
            mark = number % 2 == 1
            args = {"file": str(self._file), "n": number} if mark else {"add": 1}
            module = "lab.mark" if mark else "lab.memory"
            body = {"module": module, "args": args, "select": {"nodes": [self._node]}, "deadline_s": 120.0}
            self.made.append((module, api.post("/jobs", body)["id"]))
            due += EVERY_S
            self._over.wait(max(0.0, due - time.monotonic()))

    def end(self) -> None:
        self._over.set()
        self.join(30.0)
        if self.fault is not None:
            raise self.fault


def restart_once(stage: Stage, node: Node, kind: str) -> None:
    if kind == "module":
        done = orders.restart(stage.server, node, modules=["lab.memory"])
        assert done["ok"], done
    elif kind == "all":
        done = orders.restart(stage.server, node)
        assert done["ok"], done
    elif kind == "agent":
        done = orders.restart(stage.server, node, agent=True)
        assert done["ok"], done
    elif kind == "local":
        by_hand = cli(node, "restart", "--within", "120", "--wait", "150", "--json")
        assert by_hand.returncode == 0, by_hand.stdout + by_hand.stderr + node.logs(30)
    elif kind == "kill-module":
        pid = modules(node).get("lab.memory", {}).get("pid")
        if pid:
            os.kill(pid, signal.SIGKILL)
    else:
        pid = node.pid("agent")
        if pid:
            os.kill(pid, signal.SIGKILL)
    machine.wait_for(lambda: health(node).get("connected"), f"the agent after {kind}", 60.0, node.logs)
    runs(node, "lab.memory", "1.0.0")


def zombies(node: Node) -> list[int]:
    """Processes that ended and that nobody collected, below any process of this node."""
    ours = {seen.pid for seen in machine.naming(node.state)}
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] == "Z" and int(fields[1]) in ours:
                found.append(int(entry.name))
    return found


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def under_load(hall: Hall, stage: Stage, restarts: int) -> None:
    hall.server.publish_module(MODULES / "lab.mark")
    hall.server.publish_module(MODULES / "lab.memory")
    node, file = stage.node(), stage.folder / "marks"
    want_module(stage.server, stage.group, "lab.memory", "1.0.0")
    runs(node, "lab.memory", "1.0.0")
    assert row(job(stage.server, "lab.mark", node, args={"file": str(file), "n": 0}))["ok"]
    pid = node.pid("agent")
    assert pid
    before = descriptors(pid)
    load = Orders(stage.server, node, file)
    load.start()
    chance = random.Random(3)
    kinds = [(CLEAN + KILLS)[number % 6] for number in range(restarts)]
    chance.shuffle(kinds)
    killed = False
    try:
        for kind in kinds:
            killed = killed or kind in KILLS
            restart_once(stage, node, kind)
    finally:
        load.end()
    rows = _ended(stage, load.made)
    _check(rows, file, killed)
    added = sum(1 for module, each in rows if module == "lab.memory" and each["ok"])
    memory = row(job(stage.server, "lab.memory", node))["reply"]
    unsure = sum(1 for module, each in rows if module == "lab.memory" and not each["ok"])
    assert added <= memory["sum"] <= added + unsure, (added, unsure, memory)
    assert memory["starts"] > restarts // 2
    machine.wait_for(lambda: not zombies(node), "no zombies", 60.0, lambda: str(zombies(node)))
    pid = node.pid("agent")
    assert pid
    machine.wait_for(
        lambda: descriptors(pid) <= before + SPARE_DESCRIPTORS,
        f"about {before} descriptors", 60.0, lambda: str(descriptors(pid)),
    )  # fmt: skip


def _ended(stage: Stage, made: list[tuple[str, str]]) -> list[tuple[str, dict[str, Any]]]:
    """The row of every order, once all have ended: none is lost."""
    rows = []
    for module, order in made:
        rows.append((module, orders.ended(stage.server, order, 180.0)))
    assert {each["state"] for _, each in rows} <= set(FINAL) - {"lost", "lapsed", "cancelled"}
    return rows


def _check(rows: list[tuple[str, dict[str, Any]]], file: Path, killed: bool) -> None:
    """A job that went well ran once; only what was cut off by a kill ended otherwise, and ran once at most."""
    counted = Counter(file.read_text().split())
    assert max(counted.values()) == 1, [n for n, count in counted.items() if count > 1]
    for module, each in rows:
        if module == "lab.mark" and each["ok"]:
            assert counted[str(each["reply"]["n"])] == 1, each
    cut = [each for _, each in rows if not each["ok"]]
    assert killed or not cut, cut
    assert {each["code"] for each in cut} <= {"interrupted", "module-ended"}, cut
    print(f"{len(rows)} jobs, {len(cut)} of them cut off by a kill")


def test_restarts_under_load(hall: Hall, stage: Stage) -> None:
    under_load(hall, stage, 24)


@pytest.mark.soak
def test_two_hundred_restarts_under_load(hall: Hall, stage: Stage) -> None:
    under_load(hall, stage, 200)


def test_clean_restarts_cut_no_job_off(hall: Hall, stage: Stage) -> None:
    """A job that runs when the agent is told to restart comes to its end first."""
    hall.server.publish_module(MODULES / "lab.mark")
    node, file = stage.node(), stage.folder / "marks"
    args = {"file": str(file), "n": 7, "seconds": 2.0}
    order = job(stage.server, "lab.mark", node, 0.0, args=args)["id"]
    machine.wait_for(file.exists, "a job that runs", 60.0, node.logs)
    assert orders.restart(stage.server, node, agent=True)["ok"]
    done = orders.ended(stage.server, order)
    assert (done["state"], done["ok"]) == ("done", True), done
    assert file.read_text().split() == ["7"]
