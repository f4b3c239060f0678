"""The order file: what a recovery core is to do. Its form never changes (docs/protocol.md, 'The frozen part').

    {"v":1,"id","url","sha384","version","digest","target","lines":["agent"],"pin","server"?}

Fields that nobody knows are passed over.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from instar.core.errors import InputError
from instar.core.releases import Release
from instar.host.layout import LINES
from instar.trust.paths import check_path

MOST_BYTES = 65_536
ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,99}", re.ASCII)
SHA384 = re.compile(r"[0-9a-f]{96}")
PIN = re.compile(r"[0-9a-f]{64}")
URL = re.compile(r"[!-~]{1,2000}")  # visible ASCII


@dataclass(frozen=True, slots=True)
class Order:
    """`source` is where the archive is fetched, https://host:port or '' for the node's own server; `path`
    is what is asked for there. `lines` are in the order in which they are replaced."""

    id: str
    source: str
    path: str
    sha384: str
    release: Release
    target: str
    lines: tuple[str, ...]
    pin: str
    server: str = ""


def read_order(file: Path) -> Order:
    """Raises InputError `bad-order`, naming the field."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
        body = json.loads(data) if len(data) <= MOST_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise _bad(f"{file}: {error}") from None
    if not isinstance(body, dict) or body.get("v") != 1:
        raise _bad("expected a JSON object with v 1, got another")
    return _checked(body)


def _checked(body: dict[str, Any]) -> Order:
    source, path = _split(_text(body, "url", URL))
    server = body.get("server") or ""
    if server and (not isinstance(server, str) or _split(server) != (server, "/")):
        raise _bad(f"server: expected https://host:port, got {server!a:.80}")
    lines = body.get("lines")
    if not isinstance(lines, list) or not lines or any(line not in LINES for line in lines):
        raise _bad(f"lines: expected some of {', '.join(LINES)}, got {lines!a:.80}")
    try:
        release = Release(str(body.get("version")), str(body.get("digest")))
        target = check_path(str(body.get("target") or ""), "target")
    except InputError as error:
        raise _bad(error.text) from None
    return Order(
        _text(body, "id", ID),
        source,
        path,
        _text(body, "sha384", SHA384),
        release,
        target,
        tuple(line for line in LINES if line in lines),
        _text(body, "pin", PIN),
        server,
    )


def _text(body: dict[str, Any], name: str, form: re.Pattern[str]) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not form.fullmatch(value):
        raise _bad(f"{name}: expected {form.pattern}, got {value!a:.80}")
    return value


def _split(url: str) -> tuple[str, str]:
    """(server, path). A path alone is of the channel's own server."""
    if url.startswith("/"):
        return "", url
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises for one that is no number
    except ValueError as error:
        raise _bad(f"url: {error}") from None
    if parts.scheme != "https" or not parts.hostname or parts.username or parts.fragment:
        raise _bad(f"url: expected https://host:port/path or /path, got {url!a:.80}")
    query = f"?{parts.query}" if parts.query else ""
    return f"https://{parts.netloc}", f"{parts.path or '/'}{query}"


def _bad(why: str) -> InputError:
    return InputError("bad-order", f"cannot read the order: {why}")
