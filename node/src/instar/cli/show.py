"""Commands that look and change nothing: status, history, version. The disk is the truth."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

from instar.cli.slots import slot_lines, slots
from instar.core.errors import InstarError
from instar.core.journal import timeline
from instar.core.modules import NAME, PREFIX
from instar.core.releases import version_of
from instar.engine.journal import Journal, Journals
from instar.host import processes, trials
from instar.host.clock import Clock
from instar.host.layout import LINES, Layout
from instar.host.line import Line
from instar.host.program import running_program
from instar.host.records import read_held, read_node, read_quarantine
from instar.host.sockets import ask
from instar.targets import module_store

ASK_S = 2.0


def status(args: argparse.Namespace) -> dict[str, Any]:
    layout, clock = Layout(args.state), Clock()
    node = read_node(layout)
    return {
        "node": node.node,
        "server": node.server,
        "group": node.group,
        "lines": {role: _line(layout, role, clock) for role in LINES},
        "system": slots(layout),
        "modules": {name: found for name in _modules(layout) if (found := _module(layout, name))},
        "quarantine": [
            {"line": name.partition(":")[0], "version": e.version, "until": e.until, "reason": e.reason.text}
            for name, e in read_quarantine(layout.quarantine).items()
            if e.until > clock.wall()
        ],
        "held": {
            line: {"version": hold.version, "digest": hold.digest, "since": hold.since}
            for line, hold in read_held(layout.held).items()
            if hold.release == Line(layout.line(line)).current()
        },
    }


def _line(layout: Layout, role: str, clock: Clock) -> dict[str, Any]:
    try:  # asked first: under systemd that starts an updater that has left
        said = ask(layout.socket(role), {"do": "health"}, ASK_S)
        told = {"digest": said.get("digest", ""), "connected": said.get("connected"), "answers": True}
    except InstarError:
        told = {"digest": "", "connected": None, "answers": False}
    line = Line(layout.line(role))
    process = processes.recorded(layout.process(role))
    runs = process is not None and processes.alive(process, clock.boot_id())
    trial = trials.read(line) if layout.line(role).trial.exists() else None
    return {
        "current": line.current(),
        "previous": line.previous(),
        "running": process.release if process and runs else "",
        "pid": process.pid if process and runs else 0,
        "trial": trial.tx if trial and trial.open else "",
        **told,
    }


def _modules(layout: Layout) -> list[str]:
    """Every module that has a folder here, wanted or fetched for a job."""
    try:
        return sorted(path.name for path in layout.modules.iterdir() if NAME.fullmatch(path.name))
    except FileNotFoundError:
        return []


def _module(layout: Layout, name: str) -> dict[str, Any]:
    """A service module's line, as the disk has it; {} for a module without one. Whether it is well: `modules`."""
    line = Line(layout.module(name))
    trial = trials.read(line) if layout.module(name).trial.exists() else None
    if not line.current() and trial is None:
        return {}
    return {
        "current": line.current(),
        "previous": line.previous(),
        "trial": trial.tx if trial and trial.open else "",
    }


def status_lines(answer: dict[str, Any]) -> Iterator[str]:
    yield f"node     {answer['node']}  group {answer['group']}  server {answer['server']}"
    for role, line in answer["lines"].items():
        state = f"pid {line['pid']}" if line["running"] else "not running"
        if line["connected"] is not None:
            state += ", connected" if line["connected"] else ", not connected"
        if line["trial"]:
            state += ", on trial"
        yield f"{role:8} {line['current'] or 'no release':28} {state}"
        if line["running"] and line["running"] != line["current"]:
            yield f"{'':8} runs {line['running']} still"
    if answer["system"]:
        yield from slot_lines(answer["system"])
    for name, line in answer["modules"].items():
        state = "  on trial" if line["trial"] else ""
        yield f"module   {line['current'] or 'no release':28} {name}{state}"
    for entry in answer["quarantine"]:
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["until"]))
        yield f"kept out {entry['line']} {entry['version']} until {until}: {entry['reason']}"
    for line, hold in answer["held"].items():
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(hold["since"]))
        yield f"held     {line} {hold['version']}, pushed at {since}, until the server has a newer wish"


def history(args: argparse.Namespace) -> dict[str, Any]:
    layout = Layout(args.state)
    read_node(layout)
    journals = Journals(layout.journal, Clock()).read_all()
    entries = [_transaction(journal) for journal in journals]
    entries += [entry for name in _modules(layout) if (entry := _retired(layout, name))]
    entries.sort(key=lambda entry: float(entry["began"]))
    return {"transactions": entries[-args.limit :]}


def _retired(layout: Layout, name: str) -> dict[str, Any]:
    """The end of a module that is no longer wanted, in the form of a transaction; {} when it has none."""
    found = module_store.retirement(layout.module(name))
    if found is None:
        return {}
    text = "the server does not want it on this node any more"
    return {
        "tx": "",
        "line": f"{PREFIX}{name}",
        "cause": "retire",
        "version": "",
        "digest": "",
        "from_version": version_of(found.release),
        "state": "retired",
        "reason": {"code": "not-wanted", "text": text},
        "began": found.wall,
        "ended": found.wall if found.told else None,
        "via": "",
        "probes": {},
        "changes": [{"number": 0, "state": "retired", "wall": found.wall, "reason": text}],
    }


def _transaction(journal: Journal) -> dict[str, Any]:
    progress = journal.progress
    begin, reason = progress.begin, progress.reason
    return {
        "tx": begin.tx,
        "line": begin.line,
        "cause": begin.cause,
        "version": begin.version,
        "digest": begin.digest,
        "from_version": version_of(begin.origin) if begin.origin else "",
        "state": progress.state.value,
        "reason": {"code": reason.code, "text": reason.text} if reason else None,
        "began": progress.began.wall,
        "ended": progress.changed.wall if progress.finished and progress.changed else None,
        "via": begin.via,
        "probes": progress.data.get("probes", {}),
        "changes": [
            {
                "number": change.number,
                "state": change.state.value,
                "wall": change.at.wall,
                "reason": change.reason.text if change.reason else "",
            }
            for change in timeline(journal.records)
        ],
    }


def history_lines(answer: dict[str, Any]) -> Iterator[str]:
    if not answer["transactions"]:
        yield "no transaction yet: this node runs what it was installed with"
    for entry in answer["transactions"]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["began"]))
        said = entry["reason"]["text"] if entry["reason"] else ""
        if entry["ended"] is None:  # what it has met last, since it reached this state
            said = entry["changes"][-1]["reason"] or said
        why = f": {said}" if said else ""
        step = f"{entry['from_version'] or 'none'} -> {entry['version'] or 'none'}"
        how = f" (by {entry['via']})" if entry["via"] else ""
        yield f"{when}  {entry['line']:8} {step:24} {entry['state']}{how}{why}"
        restored = entry["probes"].get("restored")
        if restored:
            state = "answers" if restored["ok"] else f"does not answer: {restored['why']}"
            yield f"{'':19}  {'':8} {restored['release']} was put back, and {state}"


def version(args: argparse.Namespace) -> dict[str, Any]:
    program = running_program(sys.argv[0])
    return {"version": program.version, "digest": program.digest}


def version_lines(answer: dict[str, Any]) -> Iterator[str]:
    yield f"instar {answer['version']} ({answer['digest']})"
