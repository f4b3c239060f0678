"""Who this node is: identity/node.json, and its one reader."""

from __future__ import annotations

import json
from typing import NamedTuple

from instar.core.errors import MachineError
from instar.host.files import write_atomic
from instar.host.layout import Layout


class Node(NamedTuple):
    """Written at enrolment. `enrolled` is unix time."""

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
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MachineError("bad-identity", f"cannot read {layout.node}: {error!r:.200}") from None


def write_node(layout: Layout, node: Node) -> None:
    write_atomic(layout.node, json.dumps({"v": 1, **node._asdict()}).encode(), 0o600)
