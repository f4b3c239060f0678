"""The demo's second half: modules that no node had, jobs, and restarts with jobs under way.

Each act returns one line on what came of it, and raises WrongEnd when something is not as it must be.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from instar.host.sockets import ask
from instar_lab import machine, modules
from instar_lab.demo.checks import (
    WrongEnd,
    check_done,
    check_other_processes,
    check_processes,
    check_same_state,
)
from instar_lab.demo.script import ASKED, GROUP, KEPT, VERSION
from instar_lab.fleet import Fleet
from instar_lab.node import Node
from instar_lab.program import build
from instar_server.ctl.orders import whole

JOB_S = 90.0  # the deadline of a job, and for all answers to come
EVERY_S = 0.1  # between two orders while something is restarted
JOBS_AROUND = 3  # ordered before the restart, and after it
WITHIN_S = 90.0  # the bound of a restart
TOLD_S = 60.0  # for a change to be told by every node
Wait = Callable[[Callable[[list[dict[str, Any]]], bool], str], None]


class Work:
    """`program`: what all nodes run. `wait` looks at the nodes' histories until each is as it should be."""

    def __init__(self, fleet: Fleet, program: build.Program, wait: Wait) -> None:
        self._fleet, self._program, self._wait = fleet, program, wait
        self._api = fleet.server.api
        self._watched = fleet.folder / "watched"
        self.acts: dict[str, Callable[[], str]] = {
            "a new module": self.job,
            "a service module": self.service,
            "restart of a module": self.restart_module,
            "restart of the agent": self.restart_agent,
        }

    # --- the acts

    def job(self) -> str:
        """A module that no node has is fetched, and run on all; the second time it is there already."""
        for name in (ASKED, KEPT):
            self._fleet.server.publish_module(modules.OURS / name)
        folders = [node.layout.module(ASKED).releases for node in self._fleet.nodes]
        if there := [str(folder) for folder in folders if folder.exists()]:
            raise WrongEnd(
                "not-new", f"cannot show how {ASKED} comes: expected no node to have it, got {there}"
            )
        before = interface_names()
        first = self._timed_job(ASKED, {"all": True})
        sure = before & interface_names()  # one that came or went meanwhile says nothing
        for row in first["rows"]:
            told = {each["name"] for each in row["reply"]["interfaces"]}
            if not sure <= told:
                raise WrongEnd("wrong-answer", f"{row['node']}: expected {sorted(sure)}, got {sorted(told)}")
        again = self._timed_job(ASKED, {"all": True})
        for folder in folders:
            if len(kept := list(folder.iterdir())) != 1:
                raise WrongEnd("not-kept", f"{folder}: expected one release, got {len(kept)}")
        return (
            f"{len(first['rows'])} nodes fetched it, checked it and answered within {first['took'] * 1000:.0f} ms, "
            f"and within {again['took'] * 1000:.0f} ms the second time"
        )

    def service(self) -> str:
        """A service module comes by its own transaction, with a trial, and does its work on each node."""
        line = f"module/{KEPT}"
        wish = {"scope": "group", "subject": GROUP, "lines": [line], "version": VERSION}
        self._api.put("/wishes", wish)
        self._wait(lambda events: confirmed(events, line), f"{KEPT} confirmed on every node")
        self._pids()
        self._watched.mkdir()
        file = self._watched / "file"
        file.write_text("as it was\n")
        self._ask({"do": "watch", "paths": [str(self._watched)], "every_s": 1})
        self._until(lambda row: row["reply"]["settled"], {"do": "status"}, "a first look at all files")
        began = time.monotonic()
        file.write_text("not any more\n")
        self._until(lambda row: tells_of(row, file), {"do": "changes"}, "the change of a file to be told")
        took = time.monotonic() - began
        return f"{len(self._fleet.nodes)} nodes confirmed it, and told of a changed file {took:.1f} s later"

    def restart_module(self) -> str:
        """The module is another process afterwards, the agent is the same, the module's state is found again."""
        agents, before, told = self._agents(), self._pids(), self._ask({"do": "changes"})
        said = self._restart({"modules": [KEPT]})
        check_other_processes(before, self._pids(), KEPT)
        if (now := self._agents()) != agents:
            raise WrongEnd("wrong-processes", f"expected the agents {agents} to go on, got {now}")
        check_same_state(told, self._ask({"do": "changes"}))
        return said

    def restart_agent(self) -> str:
        """Agent and module are other processes afterwards, of the same release; the state is found again."""
        agents, before, told = self._agents(), self._pids(), self._ask({"do": "changes"})
        said = self._restart({"agent": True})
        check_other_processes(agents, self._agents(), "the agent")
        check_other_processes(before, self._pids(), KEPT)
        for node in self._fleet.nodes:
            check_processes(node, self._program)
        check_same_state(told, self._ask({"do": "changes"}))
        return said

    # --- jobs

    def _order(self, module: str, args: dict[str, Any], wait_s: float) -> dict[str, Any]:
        body = {"module": module, "args": args, "select": {"group": GROUP}, "deadline_s": JOB_S}
        return dict(self._api.post("/jobs", body | {"wait_s": wait_s}))

    def _timed_job(self, module: str, args: dict[str, Any]) -> dict[str, Any]:
        """The order when every node has done it, and `took`: seconds from the order to the last answer."""
        began = time.monotonic()
        order = self._order(module, args, JOB_S)
        took = time.monotonic() - began
        return self._done(order["id"]) | {"took": took}

    def _ask(self, args: dict[str, Any]) -> dict[str, Any]:
        return self._timed_job(KEPT, args)

    def _done(self, order: str) -> dict[str, Any]:
        """The order with all rows. Raises WrongEnd unless every node did it."""
        found = whole(self._api, order)
        check_done(found, len(self._fleet.nodes))
        return found

    def _until(self, arrived: Callable[[dict[str, Any]], bool], args: dict[str, Any], what: str) -> None:
        """Ask the service module on every node again and again until all answers are so."""
        machine.wait_for(lambda: all(map(arrived, self._ask(args)["rows"])), what, TOLD_S, self._fleet.logs)

    # --- restarts

    def _restart(self, what: dict[str, Any]) -> str:
        """Restart on all nodes while jobs arrive for all of them. Every job must be done, on every node."""
        questions = cycle([(ASKED, {}), (KEPT, {"do": "status"})])
        orders: list[str] = []

        def more() -> None:
            orders.append(self._order(*next(questions), 0.0)["id"])
            machine.pause(EVERY_S)

        for _ in range(JOBS_AROUND):
            more()
        began = time.monotonic()
        body = {"select": {"group": GROUP}, "within_s": WITHIN_S, **what}
        restart = self._api.post("/restarts", body)["id"]
        while self._api.get(f"/jobs/{restart}")["open"]:
            if time.monotonic() - began > WITHIN_S + JOB_S:
                raise WrongEnd("restart-late", f"expected {restart} to end, got {whole(self._api, restart)}")
            more()
        took = time.monotonic() - began
        for _ in range(JOBS_AROUND):
            more()
        self._done(restart)
        machine.wait_for(lambda: not any(map(self._open, orders)), "the end of all jobs", JOB_S)
        count = Counter(row["node"] for order in orders for row in self._done(order)["rows"])
        return (
            f"{len(count)} nodes did it within {took:.1f} s; each of {len(orders)} jobs that came meanwhile "
            f"was done by all of them, and {KEPT} found its state again"
        )

    def _open(self, order: str) -> bool:
        return bool(self._api.get(f"/jobs/{order}")["open"])

    # --- processes

    def _agents(self) -> dict[str, int | None]:
        return {node.id: node.pid("agent") for node in self._fleet.nodes}

    def _pids(self) -> dict[str, int | None]:
        """Node id -> the living process of the service module. Raises WrongEnd when one is not well."""
        return {node.id: module_pid(node, KEPT) for node in self._fleet.nodes}


def module_pid(node: Node, name: str) -> int:
    """Raises WrongEnd unless the module is well and its process lives."""
    told = {
        each["name"]: each for each in ask(node.layout.socket("agent"), {"do": "modules"}, 5.0)["modules"]
    }
    found = told.get(name, {})
    if found.get("state") != "ok" or not Path(f"/proc/{found['pid']}").exists():
        raise WrongEnd("wrong-module", f"{node.id}: expected {name} to run well, got {found or 'nothing'}")
    return int(found["pid"])


def confirmed(events: list[dict[str, Any]], line: str) -> bool:
    last = [event for event in events if event["line"] == line]
    return bool(last) and last[-1]["phase"] == "confirmed"


def tells_of(row: dict[str, Any], file: Path) -> bool:
    return any(
        change["path"] == str(file) and change["change"] == "changed" for change in row["reply"]["changes"]
    )


def interface_names() -> set[str]:
    return {name for _, name in socket.if_nameindex()}
