"""The node's small files: who it is, what it may do, what it keeps away or holds. Each is read anew when needed.

Who it is and what it may do have readers of their own, which the agent uses without the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from instar.core.errors import InputError
from instar.core.held import Hold
from instar.core.journal import Reason
from instar.core.quarantine import Entry
from instar.core.releases import Release
from instar.host.config import read_config
from instar.host.files import DISK, Disk, write_atomic
from instar.host.identity import Node, read_node, write_node
from instar.host.layout import Layout

__all__ = [
    "Node",
    "read_artifacts",
    "read_config",
    "read_held",
    "read_node",
    "read_quarantine",
    "write_artifacts",
    "write_held",
    "write_node",
    "write_quarantine",
]

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def read_quarantine(path: Path) -> dict[str, Entry]:
    """The releases kept away. A file that cannot be read is set aside: it must not stop a node."""
    try:
        body = json.loads(path.read_bytes())["entries"]
        return {name: _entry(fields) for name, fields in body.items()}
    except FileNotFoundError:
        return {}
    except UNREADABLE:
        with contextlib.suppress(OSError):
            os.replace(path, path.with_suffix(".unreadable"))
        return {}


def _entry(fields: dict[str, Any]) -> Entry:
    reason = Reason(str(fields["reason"]["code"]), str(fields["reason"]["text"]))
    count, since, until = int(fields["count"]), float(fields["since"]), float(fields["until"])
    return Entry(str(fields["version"]), reason, count, since, until, int(fields.get("generation", 0)))


def write_quarantine(path: Path, entries: dict[str, Entry], disk: Disk = DISK) -> None:
    body = {"v": 1, "entries": {name: asdict(entry) for name, entry in entries.items()}}
    write_atomic(path, json.dumps(body).encode(), 0o600, disk)


def read_held(path: Path) -> dict[str, Hold]:
    """The lines that are held, with what. A file that cannot be read is set aside, and nothing is held."""
    try:
        lines = json.loads(path.read_bytes())
        return {str(line): _hold(fields) for line, fields in lines.items()}
    except FileNotFoundError:
        return {}
    except (*UNREADABLE, InputError):
        with contextlib.suppress(OSError):
            os.replace(path, path.with_suffix(".unreadable"))
        return {}


def _hold(fields: dict[str, Any]) -> Hold:
    release = Release(str(fields["version"]), str(fields["digest"]))
    return Hold(release.version, release.digest, int(fields["generation"]), float(fields["since"]))


def write_held(path: Path, held: Mapping[str, Hold], disk: Disk = DISK) -> None:
    body = {line: asdict(hold) for line, hold in held.items()}
    write_atomic(path, json.dumps(body).encode(), 0o600, disk)


def read_artifacts(layout: Layout) -> str:
    """Where the server said last that metadata and targets are, https://host:port; '' for the server itself."""
    try:
        return str(json.loads(layout.artifacts.read_bytes())["server"])
    except UNREADABLE:
        return ""


def write_artifacts(layout: Layout, server: str) -> None:
    """For processes that do not ask the server what is wanted. Forgotten at the next boot, if need be."""
    if server != read_artifacts(layout):
        write_atomic(layout.artifacts, json.dumps({"server": server}).encode(), 0o600)
