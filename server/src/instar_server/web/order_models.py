"""What the API takes and gives about orders: jobs and restarts. Times are unix seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints

from instar.core import modules
from instar_server.domain import names
from instar_server.domain.selectors import MOST_CONDITIONS, MOST_NODES, Selector
from instar_server.services.orders import MAX_WAIT_S, OrderView
from instar_server.web.models import Body, NodeId, Version

OrderId = Annotated[str, StringConstraints(pattern=r"^o-[0-9a-f]{24}$")]
ModuleName = Annotated[str, StringConstraints(pattern=names.MODULE_PATTERN, max_length=modules.MOST_NAME)]
FactName = Annotated[str, StringConstraints(min_length=1, max_length=64)]
FactValue = Annotated[str, StringConstraints(max_length=256)] | bool | int | float
Wait = Annotated[float, Field(ge=0, le=MAX_WAIT_S)]
Lapse = Annotated[float, Field(ge=1, le=14 * 86_400.0)]
State = Literal["queued", "sent", "taken", "running", "done", "failed", "cancelled", "lapsed", "lost"]


class Select(Body):
    """One of `nodes`, `group` and `all`; `where` narrows it down, and alone means all nodes that are so.

    `where`: `os`, `arch`, `version` (the agent's) and `python`, and any fact that nodes enrolled with.
    """

    nodes: Annotated[list[NodeId], Field(max_length=MOST_NODES, default_factory=list)]
    group: Annotated[str, StringConstraints(pattern=r"^$|" + names.GROUP_PATTERN)] = ""
    all: bool = False
    where: Annotated[dict[FactName, FactValue], Field(max_length=MOST_CONDITIONS, default_factory=dict)]

    def selector(self) -> Selector:
        return Selector(tuple(dict.fromkeys(self.nodes)), self.group, self.all, dict(self.where))


class JobBody(Body):
    """Seconds. `version`: the newest if it is not given. `deadline_s` is for one run; a node that has not begun
    `lapse_s` after now does not begin. The answer comes when all rows have ended, or after `wait_s`."""

    module: ModuleName
    version: Version | None = None
    args: Annotated[dict[str, Any], Field(default_factory=dict)]
    select: Select
    deadline_s: Annotated[float, Field(ge=0.1, le=86_400)] = 30.0
    lapse_s: Lapse = 86_400.0
    wait_s: Wait = 0.0


class RestartBody(Body):
    """`modules`: those alone; none: all of them. `agent`: the agent too. `within_s` is for the whole."""

    select: Select
    modules: Annotated[list[ModuleName], Field(max_length=32, default_factory=list)]
    agent: bool = False
    within_s: Annotated[float, Field(ge=1, le=3600)] = 30.0
    lapse_s: Lapse = 3600.0
    wait_s: Wait = 0.0


class Row(BaseModel):
    """One node's part in an order.

    `ok` is the node's own last word, absent while there is none. `code` and `text` say why it is not ok (or, without
    the node's word, what the server concluded). `output` is the end of what it said while it ran.
    """

    id: str
    node: str
    state: State
    ok: bool | None
    code: str
    text: str
    reply: dict[str, Any]
    exit_code: int
    signal: int
    seconds: float
    max_rss: int
    stderr: str
    output: str
    sends: int
    sent_at: float | None
    taken_at: float | None
    started_at: float | None
    ended_at: float | None


class Order(BaseModel):
    """A job or a restart (`kind` command) for the `nodes` that were meant when it was made.

    `states` counts its rows by state, `open` those that have not ended. `next` is what to give as `after` for
    the next page of rows, absent on the last one.
    """

    id: str
    kind: Literal["job", "command"]
    name: str
    version: str
    digest: str
    args: dict[str, Any]
    select: dict[str, Any]
    nodes: int
    deadline_s: float
    lapse_at: float
    made: float
    made_by: str
    cancelled_at: float | None
    cancelled_by: str
    states: dict[State, int]
    open: int
    rows: list[Row]
    next: NodeId | None


class Orders(BaseModel):
    """Newest first, without their rows. `next` is what to give as `before` for the next page."""

    orders: list[Order]
    next: str | None


def row_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as it is stored, as `Row` has it."""
    result = json.loads(row["result"]) if row["result"] else {}
    return {
        "id": row["id"], "node": row["node"], "state": row["state"],
        "ok": None if row["ok"] is None else bool(row["ok"]), "code": row["code"], "text": row["text"],
        "reply": result.get("reply", {}), "exit_code": result.get("exit_code", 0),
        "signal": result.get("signal", 0), "seconds": result.get("seconds", 0.0),
        "max_rss": result.get("max_rss", 0), "stderr": result.get("stderr", ""), "output": row["output"],
        "sends": row["sends"], "sent_at": row["sent_at"], "taken_at": row["taken_at"],
        "started_at": row["started_at"], "ended_at": row["ended_at"],
    }  # fmt: skip


def order_of(view: OrderView) -> dict[str, Any]:
    """An order as `Order` has it."""
    order = view.order
    return {
        "id": order.id, "kind": order.kind, "name": order.name, "version": order.version, "digest": order.digest,
        "args": json.loads(order.args), "select": json.loads(order.selector), "nodes": order.nodes,
        "deadline_s": order.deadline_s, "lapse_at": order.lapse_at, "made": order.made, "made_by": order.made_by,
        "cancelled_at": order.cancelled_at, "cancelled_by": order.cancelled_by, "states": view.counts,
        "open": view.open, "rows": [row_of(row) for row in view.rows], "next": view.next,
    }  # fmt: skip
