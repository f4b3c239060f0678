"""`instar push`: hand a release to this node's own updater, from a file (requirement D1). What orders a transaction
follows it to its end from here, too.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import json
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instar.core.errors import InputError, InstarError, MachineError, ReleaseError
from instar.core.journal import Progress, timeline
from instar.engine.journal import Journal, Journals
from instar.host.clock import Clock
from instar.host.layout import Layout
from instar.host.records import read_node

BLOCK = 262_144
ANSWER_S = 60.0
POLL_S = 0.1
ASK_EVERY_S = 1.0  # about a transaction that has no journal yet


def push(args: argparse.Namespace) -> dict[str, Any]:
    """Send the parcel, and wait for the end of what comes of it: a transaction like any other."""
    layout, clock = Layout(args.state), Clock()
    read_node(layout)
    made = _send(layout.socket("updater"), args.parcel, args.line)
    return _ended(follow(layout, clock, made["tx"], args.wait))


def follow(layout: Layout, clock: Clock, tx: str, within_s: float) -> Progress:
    """The end of a transaction that was ordered. Raises MachineError `still-under-way` with what holds it up,
    InputError `unknown-transaction` when nothing comes of the order."""
    end, ask_at = clock.monotonic() + within_s, clock.monotonic() + ASK_EVERY_S
    journals = Journals(layout.journal, clock)
    while True:
        journal = journals.read(tx)
        if journal is not None and journal.progress.finished:
            return journal.progress
        if clock.monotonic() >= end:
            text = f"no end of {tx} within {within_s:g} s: {_how_far(journal)}; see `instar history`"
            raise MachineError("still-under-way", text)
        if journal is None and clock.monotonic() >= ask_at:
            _still_known(layout.socket("updater"), tx)
            ask_at = clock.monotonic() + ASK_EVERY_S
        time.sleep(POLL_S)


def _how_far(journal: Journal | None) -> str:
    """With what it has met last, if that was trouble."""
    if journal is None:
        return "it has not begun"
    reason = timeline(journal.records)[-1].reason
    return f"it waits, since the last try ended so: {reason.text}" if reason else "it goes on"


def push_lines(answer: dict[str, Any]) -> Iterator[str]:
    yield f"{answer['line']} runs {answer['version']} ({answer['digest'][:12]})"


class _Connection(http.client.HTTPConnection):
    """HTTP over the updater's socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=ANSWER_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _send(path: Path, parcel: Path, line: str) -> dict[str, Any]:
    """What the updater has made of it. Raises InputError with the updater's own code when it says no."""
    try:
        with parcel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha384").hexdigest()
            size = file.tell()
            file.seek(0)
            with contextlib.closing(_Connection(path)) as connection:
                try:
                    connection.putrequest("POST", f"/v1/push?line={line}")
                    connection.putheader("Content-Length", str(size))
                    connection.putheader("Instar-SHA384", digest)
                    connection.endheaders()
                    _send_body(connection, iter(lambda: file.read(BLOCK), b""))
                    return _answer(connection)
                except (OSError, http.client.HTTPException) as error:
                    words = str(error) or type(error).__name__
                    raise MachineError("no-answer", f"cannot push to {path.name}: {words}") from None
    except OSError as error:
        raise InputError("no-file", f"cannot read {parcel}: {error.strerror}") from None


def _send_body(connection: _Connection, blocks: Iterator[bytes]) -> None:
    """Until there is an answer: one that comes early says why no more is wanted."""
    for block in blocks:
        if select.select([connection.sock], [], [], 0)[0]:
            return
        try:
            connection.send(block)
        except (BrokenPipeError, ConnectionResetError):
            return


def _answer(connection: _Connection) -> dict[str, Any]:
    answer = connection.getresponse()
    try:
        body = json.loads(answer.read())
        if answer.status < 300:
            return dict(body)
        code, text = str(body["error"]["code"]), str(body["error"]["message"])
    except (ValueError, KeyError, TypeError):
        code, text = "refused", f"it answered with the status {answer.status}"
    raise InputError(code, text)


def _still_known(path: Path, tx: str) -> None:
    """Raises InputError `unknown-transaction` when the order could not be carried out, or is lost."""
    with (
        contextlib.closing(_Connection(path)) as connection,
        contextlib.suppress(OSError, http.client.HTTPException),
    ):
        connection.request("GET", f"/v1/transactions/{tx}")
        try:
            _answer(connection)
        except InputError as error:
            if error.code == "unknown-transaction":  # else it cannot tell just now
                text = f"nothing came of {tx}: the updater could not begin it, and its log says why"
                raise InputError(error.code, text) from None


def _ended(progress: Progress) -> dict[str, Any]:
    begin, reason = progress.begin, progress.reason
    if reason is not None:
        raise with_probes(ReleaseError(reason.code, f"it went back: {reason.text}"), progress)
    return {"tx": begin.tx, "line": begin.line, "version": begin.version, "digest": begin.digest}


def with_probes(error: InstarError, progress: Progress) -> InstarError:
    """The captured output of both releases belongs to the reason (requirement D6)."""
    probes = progress.data.get("probes") or {}
    for part in ("candidate", "restored"):
        probe = probes.get(part)
        if probe:
            how = "answered" if probe.get("ok") else f"did not answer as it should: {probe.get('why')}"
            error.text += f"\n  {part} {probe.get('release')} {how}"
            error.text += "".join(f"\n    {line}" for line in str(probe.get("output") or "").splitlines())
    return error
