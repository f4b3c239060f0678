"""The node's small files: who it is, what it may do, what it keeps away. Each is read anew when needed."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from instar.core.errors import InputError, MachineError
from instar.core.journal import Reason
from instar.core.quarantine import Entry
from instar.core.settings import Settings, read_settings
from instar.host.files import DISK, Disk, write_atomic
from instar.host.layout import Layout


@dataclass(frozen=True, slots=True)
class Node:
    """identity/node.json, written at enrolment. `enrolled` is unix time."""

    node: str
    server: str
    group: str
    enrolled: float


def read_node(layout: Layout) -> Node:
    """Raises MachineError `not-enrolled` or `bad-identity`; there is no node without it."""
    try:
        body = json.loads(layout.node.read_bytes())
        return Node(str(body["node"]), str(body["server"]), str(body["group"]), float(body["enrolled"]))
    except FileNotFoundError:
        text = f"cannot find {layout.node}: this is no node yet; run `instar install --state {layout.state}`"
        raise MachineError("not-enrolled", text) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MachineError("bad-identity", f"cannot read {layout.node}: {error!r}") from None


def write_node(layout: Layout, node: Node) -> None:
    write_atomic(layout.node, json.dumps({"v": 1, **asdict(node)}).encode(), 0o600)


def read_config(layout: Layout) -> Settings:
    """config.toml; the defaults where there is none.

    Raises InputError `bad-config` naming the fault. Callers that must run go on with `Settings()`.
    """
    import tomllib

    try:
        return read_settings(tomllib.loads(layout.config.read_text()))
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError("bad-config", f"cannot read {layout.config}: {error}") from None


def read_quarantine(path: Path) -> dict[str, Entry]:
    """The releases kept away. A file that cannot be read is set aside: it must not stop a node."""
    try:
        body = json.loads(path.read_bytes())["entries"]
        return {name: _entry(fields) for name, fields in body.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        with contextlib.suppress(OSError):
            os.replace(path, path.with_suffix(".unreadable"))
        return {}


def _entry(fields: dict[str, Any]) -> Entry:
    reason = Reason(str(fields["reason"]["code"]), str(fields["reason"]["text"]))
    count, since, until = int(fields["count"]), float(fields["since"]), float(fields["until"])
    return Entry(str(fields["version"]), reason, count, since, until)


def write_quarantine(path: Path, entries: dict[str, Entry], disk: Disk = DISK) -> None:
    body = {"v": 1, "entries": {name: asdict(entry) for name, entry in entries.items()}}
    write_atomic(path, json.dumps(body).encode(), 0o600, disk)
