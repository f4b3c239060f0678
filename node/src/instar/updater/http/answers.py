"""What a call is answered: JSON with a status, or a stream of events; and which status an error has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from instar.core.errors import InstarError, MachineError

# As on the gateway: the code says what is wrong, the status what kind of wrong it is.
STATUS = {
    "aborted": 409,
    "already-current": 409,
    "bad-version": 505,
    "busy": 409,
    "failed-precondition": 412,
    "head-too-large": 431,
    "length-required": 411,
    "method-not-allowed": 405,
    "not-an-operator": 403,
    "not-allowed": 403,
    "no-slots": 412,
    "not-found": 404,
    "nothing-to-roll-back-to": 409,
    "too-large": 413,
    "too-slow": 408,
    "unknown-transaction": 404,
}
PHRASE = {
    200: "OK", 202: "Accepted", 400: "Bad Request", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict", 411: "Length Required",
    412: "Precondition Failed", 413: "Content Too Large", 431: "Request Header Fields Too Large",
    500: "Internal Server Error", 503: "Service Unavailable", 505: "HTTP Version Not Supported",
}  # fmt: skip


class Answer(NamedTuple):
    status: int
    body: Any
    fields: tuple[tuple[str, str], ...] = ()


class Stream(NamedTuple):
    """Server-sent events, until the iterator ends; then the connection is closed."""

    parts: Iterator[bytes]


def status_of(error: InstarError) -> int:
    if error.code in STATUS:
        return STATUS[error.code]
    return 503 if isinstance(error, MachineError) else 400


def refusal(error: InstarError, fields: tuple[tuple[str, str], ...] = ()) -> Answer:
    return Answer(status_of(error), {"error": {"code": error.code, "message": error.text}}, fields)


def encode(answer: Answer, keeps: bool, with_body: bool = True) -> bytes:
    """The whole answer. `keeps`: another request may follow on this connection."""
    body = json.dumps(answer.body, separators=(",", ":")).encode() + b"\n"
    fields = (
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
        *answer.fields,
        *(() if keeps else (("Connection", "close"),)),
    )
    return _head(answer.status, fields) + (body if with_body else b"")


def encode_stream_head() -> bytes:
    fields = (("Content-Type", "text/event-stream"), ("Cache-Control", "no-store"), ("Connection", "close"))
    return _head(200, fields)


def _head(status: int, fields: tuple[tuple[str, str], ...]) -> bytes:
    lines = [f"HTTP/1.1 {status} {PHRASE[status]}", *(f"{name}: {value}" for name, value in fields)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
