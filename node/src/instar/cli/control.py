"""Commands that make the daemons do something: start, stop, rollback, quarantine."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

from instar.cli import units
from instar.cli.push import follow, with_probes
from instar.core.errors import InputError, MachineError, ReleaseError
from instar.core.journal import Progress
from instar.engine.journal import Journals
from instar.host import processes, rescue
from instar.host.clock import Clock
from instar.host.layout import LINES, Layout
from instar.host.records import read_node, read_quarantine, write_quarantine
from instar.host.services import services_of
from instar.host.sockets import ask

UP_S = 30.0  # for three programs, one after the other, on a small machine that is busy
POLL_S = 0.05
ASK_AGAIN_S = 1.0


def start(args: argparse.Namespace) -> dict[str, Any]:
    """Start both roles and wait until their processes are there."""
    layout, clock = Layout(args.state), Clock()
    read_node(layout)
    services = services_of(layout, clock)
    if services.name == "systemd" and (trouble := units.start_triggers(layout)):
        print(f"instar: the updater's API is off: {trouble}", file=sys.stderr)
    for role in LINES:  # also one that runs: its keeper may be gone
        services.start(role)
    end, ask_again = clock.monotonic() + UP_S, clock.monotonic() + ASK_AGAIN_S
    while absent := sorted(set(LINES) - _running(layout, clock)):
        if clock.monotonic() >= ask_again:
            for role in absent:
                services.start(role)
            ask_again = clock.monotonic() + ASK_AGAIN_S
        if clock.monotonic() > end:
            text = f"cannot start the {absent[0]} within {UP_S:g} s; its words are in {layout.run}"
            raise MachineError("not-started", text)
        time.sleep(POLL_S)
    return {"running": sorted(LINES)}


def stop(args: argparse.Namespace) -> dict[str, Any]:
    layout, clock = Layout(args.state), Clock()
    read_node(layout)
    services = services_of(layout, clock)
    if services.name == "systemd":
        units.stop_triggers()  # else its timer would start the updater again
    rescue.end(layout, clock, services.name == "systemd")  # a recovery core would start both again
    for role in LINES:
        services.stop(role)
    return {"running": sorted(_running(layout, clock))}


def lines(answer: dict[str, Any]) -> Iterator[str]:
    yield f"running: {', '.join(answer['running']) or 'nothing'}"


def rollback(args: argparse.Namespace) -> dict[str, Any]:
    """Ask the updater for it and wait for its end: it is a transaction like any other."""
    layout, clock = Layout(args.state), Clock()
    read_node(layout)
    known = _rollbacks(layout, clock)
    aim = ask(layout.socket("updater"), {"do": "rollback", "line": args.line}, 5.0)
    tx = str(aim.get("tx", ""))
    if not tx:  # an older updater does not name it
        tx = _begun(layout, clock, known, args.wait)
    return _rolled_back(follow(layout, clock, tx, args.wait))


def _begun(layout: Layout, clock: Clock, known: set[str], within_s: float) -> str:
    end = clock.monotonic() + within_s
    while not (found := _rollbacks(layout, clock) - known):
        if clock.monotonic() >= end:
            text = f"cannot go back within {within_s:g} s: it is ordered, and has not begun; see `instar history`"
            raise MachineError("still-under-way", text)
        time.sleep(POLL_S)
    return found.pop()


def _rollbacks(layout: Layout, clock: Clock) -> set[str]:
    journals = Journals(layout.journal, clock).read_all()
    return {j.progress.begin.tx for j in journals if j.progress.begin.cause == "rollback"}


def _rolled_back(progress: Progress) -> dict[str, Any]:
    if progress.reason is not None:
        error = ReleaseError("rollback-reverted", f"cannot go back: {progress.reason.text}")
        raise with_probes(error, progress)
    return {"line": progress.begin.line, "version": progress.begin.version, "digest": progress.begin.digest}


def rollback_lines(answer: dict[str, Any]) -> Iterator[str]:
    yield f"{answer['line']} is back on {answer['version']} ({answer['digest'][:12]})"


def quarantine(args: argparse.Namespace) -> dict[str, Any]:
    layout = Layout(args.state)
    read_node(layout)
    entries = read_quarantine(layout.quarantine)
    cleared: list[str] = []
    if args.clear:
        cleared = [n for n, e in entries.items() if args.clear in ("all", e.version)]
        if not cleared and args.clear != "all":
            versions = ", ".join(sorted({e.version for e in entries.values()}))
            why = f"expected one of {versions}" if versions else "nothing is in quarantine"
            raise InputError("not-in-quarantine", f"cannot clear {args.clear}: {why}")
        entries = {n: e for n, e in entries.items() if n not in cleared}
        write_quarantine(layout.quarantine, entries)
    rows = [
        {
            "line": name.partition(":")[0],
            "version": entry.version,
            "count": entry.count,
            "until": entry.until,
            "reason": {"code": entry.reason.code, "text": entry.reason.text},
        }
        for name, entry in entries.items()
    ]
    return {"entries": rows, "cleared": len(cleared)}


def quarantine_lines(answer: dict[str, Any]) -> Iterator[str]:
    if answer["cleared"]:
        yield f"cleared {answer['cleared']}; the updater tries again when it looks next"
    for entry in answer["entries"]:
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["until"]))
        why = f"{entry['count']}x, until {until}: {entry['reason']['text']}"
        yield f"{entry['line']:8} {entry['version']:12} {why}"
    if not answer["entries"]:
        yield "nothing is in quarantine"


def _running(layout: Layout, clock: Clock) -> set[str]:
    boot_id = clock.boot_id()
    found = {role: processes.recorded(layout.process(role)) for role in LINES}
    return {role for role, process in found.items() if process and processes.alive(process, boot_id)}
