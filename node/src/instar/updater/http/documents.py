"""What the API shows: the updater's health, the releases, the transactions. Read from the disk each time."""

from __future__ import annotations

import os
from typing import Any

from instar.core.errors import InputError, InstarError
from instar.core.journal import timeline
from instar.core.releases import version_of
from instar.core.system import LINE as SYSTEM
from instar.engine.journal import Journal
from instar.host import trials
from instar.host.line import MANIFEST, VALID, Line
from instar.host.records import read_held
from instar.targets.line import LineTarget
from instar.updater.http.calls import Services
from instar.updater.orders import Orders, Pushed


def health(services: Services) -> dict[str, Any]:
    orders, program = services.orders, services.program
    under_way = orders.under_way()
    with orders.lock:
        receiving = orders.receiving
    return {
        "node": services.node,
        "version": program.version,
        "digest": program.digest,
        "release": program.release,
        "pid": os.getpid(),
        "transaction": under_way,
        "receiving": (
            {"tx": receiving.tx, "done": receiving.done, "total": receiving.total} if receiving.tx else None
        ),
        "held": _held(services),
    }


def _held(services: Services) -> dict[str, dict[str, Any]]:
    """The lines that a push holds against wishes that are no newer."""
    holds = read_held(services.layout.held)
    return {
        line: {"version": hold.version, "digest": hold.digest, "generation": hold.generation}
        for line, hold in holds.items()
    }


def releases(services: Services) -> dict[str, Any]:
    """Every line: both programs, and the modules that have releases."""
    found: list[LineTarget] = [*services.targets.programs(), *services.targets.modules()]
    return {"lines": {target.role: shown for target in found if (shown := _line(target)) is not None}}


def _line(target: LineTarget) -> dict[str, Any] | None:
    line = target.line
    current, previous = line.current(), line.previous()
    trial = trials.read(line) if line.layout.trial.exists() else None
    names = _names(line)
    if not names and not current:
        return None
    return {
        "current": current,
        "previous": previous,
        "trial": trial.tx if trial is not None and trial.open else "",
        "releases": [_release(target, name, name == current, name == previous) for name in names],
    }


def _names(line: Line) -> list[str]:
    try:
        return line.names()
    except OSError:
        return []


def _release(target: LineTarget, name: str, current: bool, previous: bool) -> dict[str, Any]:
    """D2: version, digest and when it was installed. The marker's time is that: it is written last."""
    folder = target.line.folder(name)
    try:
        digest = target.contents.release((folder / MANIFEST).read_bytes()).digest
        installed = (folder / VALID).stat().st_mtime
    except (OSError, InstarError):
        digest, installed = "", 0.0
    return {
        "name": name,
        "version": version_of(name),
        "digest": digest,
        "installed": installed,
        "valid": target.line.is_valid(name),
        "current": current,
        "previous": previous,
    }


def transactions(services: Services, limit: int) -> dict[str, Any]:
    """The newest first."""
    found = sorted(
        services.journals.read_all(), key=lambda journal: journal.progress.began.wall, reverse=True
    )
    return {"transactions": [_transaction(journal, services.orders) for journal in found[:limit]]}


def transaction(services: Services, tx: str) -> dict[str, Any]:
    """One of them, from the first byte of its push on. Raises InputError `unknown-transaction`."""
    journal = services.journals.read(tx)
    if journal is not None:
        return _transaction(journal, services.orders)
    with services.orders.lock:
        receiving, busy = services.orders.receiving, services.orders.busy
        ordered = services.orders.pushed or services.orders.update
        back, back_tx = services.orders.rollback, services.orders.rollback_tx
    if receiving.tx == tx:
        return _to_come(tx, services.orders.receiving_line, "receiving", receiving.done, receiving.total)
    if tx == back_tx and (back or busy == tx):
        return {**_to_come(tx, back, "waiting", 0, 0), "cause": "rollback", "via": ""}
    if busy == tx:  # it begins just now
        return _to_come(tx, "", "waiting", 0, 0)
    if ordered is not None and ordered.tx == tx:
        line = ordered.line if isinstance(ordered, Pushed) else SYSTEM
        return {
            **_to_come(tx, line, "waiting", 0, 0),
            "via": "push" if line != SYSTEM else "",
            "version": ordered.version,
            "digest": ordered.digest,
        }
    raise InputError("unknown-transaction", f"cannot show {tx}: there is no such transaction on this node")


def _transaction(journal: Journal, orders: Orders) -> dict[str, Any]:
    progress = journal.progress
    begin, reason = progress.begin, progress.reason
    doing = orders.doing()
    driven = doing.tx == begin.tx
    finished = progress.finished and not driven  # until it is let go, nothing else can be ordered
    ours = driven and not progress.finished
    return {
        "tx": begin.tx,
        "line": begin.line,
        "cause": begin.cause,
        "via": begin.via,
        "version": begin.version,
        "digest": begin.digest,
        "from_version": version_of(begin.origin) if begin.origin else "",
        "state": progress.state.value,
        "finished": finished,
        "phase": doing.phase if ours else "",
        "bytes": {"done": doing.done, "total": doing.total} if ours and doing.total else None,
        "reason": {"code": reason.code, "text": reason.text} if reason else None,
        "began": progress.began.wall,
        "ended": progress.changed.wall if finished and progress.changed else None,
        "changes": [
            {
                "number": change.number,
                "state": change.state.value,
                "wall": change.at.wall,
                "reason": change.reason.text if change.reason else "",
            }
            for change in timeline(journal.records)
        ],
        "probes": progress.data.get("probes"),
    }


def _to_come(tx: str, line: str, state: str, done: int, total: int) -> dict[str, Any]:
    """What was ordered, a push unless it is said, and whose transaction has not begun."""
    return {
        "tx": tx, "line": line, "cause": "push", "via": "push", "version": "", "digest": "",
        "from_version": "", "state": state, "finished": False, "phase": "",
        "bytes": {"done": done, "total": total} if total else None,
        "reason": None, "began": None, "ended": None, "changes": [], "probes": None,
    }  # fmt: skip
