"""Heads of HTTP requests: bytes in, a `Head` out, without I/O.

Strict where two readers could differ about where a request ends: one Content-Length of digits alone, no
Transfer-Encoding, no folded fields, nothing but CRLF between lines.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qsl

from instar.core.errors import InputError

MOST_HEAD = 16_384  # bytes, with the empty line at its end
END = b"\r\n\r\n"
TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
ONCE = ("content-length", "content-type", "expect", "host", "instar-sha384")
MOST_QUERY = 16  # names


class Head(NamedTuple):
    """`fields` by their names in small letters; `length` is -1 when there is no Content-Length."""

    method: str
    path: str
    query: dict[str, str]
    fields: dict[str, str]
    length: int
    keeps: bool  # the client may send another request on this connection


def parse(raw: bytes) -> Head:
    """Read a head without its empty line.

    Raises InputError `bad-request`, `bad-version`, `length-required`.
    """
    first, *lines = raw.split(b"\r\n")
    words = first.split(b" ")
    if len(words) != 3 or not words[0] or not TOKEN.issuperset(words[0]):
        raise _bad("METHOD /path HTTP/1.1", first)
    if words[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise InputError("bad-version", f"cannot read the request: expected HTTP/1.1, got {words[2]!a:.40}")
    fields = _fields(lines)
    newer = words[2] == b"HTTP/1.1"
    if newer and "host" not in fields:
        raise _bad("a Host field", b"none")
    if "transfer-encoding" in fields:
        text = "cannot read the body: expected Content-Length, got Transfer-Encoding"
        raise InputError("length-required", text)
    path, query = _target(words[1])
    options = {word.strip().lower() for word in fields.get("connection", "").split(",")}
    return Head(
        words[0].decode("ascii"), path, query, fields, _length(fields), newer and "close" not in options
    )


def _fields(lines: list[bytes]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not name or not colon or not TOKEN.issuperset(name) or not _is_value(value):
            raise _bad("fields of the form 'Name: value'", line)
        known, said = name.decode("ascii").lower(), value.strip(b" \t").decode("latin-1")
        if known in fields and known in ONCE:
            raise _bad(f"one field {known}", b"two")
        fields[known] = f"{fields[known]}, {said}" if known in fields else said
    return fields


def _is_value(value: bytes) -> bool:
    return all(byte >= 32 or byte == 9 for byte in value) and 127 not in value


def _target(raw: bytes) -> tuple[str, dict[str, str]]:
    if not raw.startswith(b"/") or any(byte <= 32 or byte >= 127 for byte in raw) or b"#" in raw:
        raise _bad("a path that starts with /", raw)
    path, _, text = raw.decode("ascii").partition("?")
    try:
        pairs = parse_qsl(
            text,
            keep_blank_values=True,
            strict_parsing=bool(text),
            errors="strict",
            max_num_fields=MOST_QUERY,
        )
    except ValueError:
        raise _bad("a query of name=value", text.encode()) from None
    query = dict(pairs)
    if len(query) != len(pairs):
        raise _bad("each name of the query once", text.encode())
    return path, query


def _length(fields: dict[str, str]) -> int:
    text = fields.get("content-length")
    if text is None:
        return -1
    if not (text.isascii() and text.isdecimal() and len(text) <= 15):
        raise _bad("a Content-Length of digits", text.encode("latin-1"))
    return int(text)


def _bad(expected: str, got: bytes) -> InputError:
    return InputError("bad-request", f"cannot read the request: expected {expected}, got {got[:60]!a}")
