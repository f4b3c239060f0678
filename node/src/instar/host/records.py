"""The node's small files: who it is, what it may do, what it keeps away. Each is read anew when needed.

Who it is and what it may do have readers of their own, which the agent uses without the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from instar.core.journal import Reason
from instar.core.quarantine import Entry
from instar.host.config import read_config
from instar.host.files import DISK, Disk, write_atomic
from instar.host.identity import Node, read_node, write_node

__all__ = ["Node", "read_config", "read_node", "read_quarantine", "write_node", "write_quarantine"]


def read_quarantine(path: Path) -> dict[str, Entry]:
    """The releases kept away. A file that cannot be read is set aside: it must not stop a node."""
    try:
        body = json.loads(path.read_bytes())["entries"]
        return {name: _entry(fields) for name, fields in body.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
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
