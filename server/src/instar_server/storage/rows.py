"""What the repositories hand out beside the values of `domain`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TokenRow:
    """An enrolment token for display. The secret itself is kept nowhere."""

    id: str
    group: str
    uses: int
    uses_left: int
    expires: float
    created: float
    label: str


@dataclass(frozen=True, slots=True)
class ApiTokenRow:
    id: str
    role: str
    created: float
    label: str


@dataclass(frozen=True, slots=True)
class CertificateRow:
    """`node_revoked` tells that the whole node was revoked."""

    serial: str
    node: str
    issued: float
    not_after: float
    revoked_at: float | None
    node_revoked: bool


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job that was sent, and what its reply must show."""

    id: str
    node: str
    purpose: str
    tx: str
    digest: str
    version: str
    nonce: str
    made: float
    ended: float | None


@dataclass(frozen=True, slots=True)
class NodeRow:
    """Everything kept about a node; `last` holds the columns that are written in batches."""

    id: str
    group: str
    enrolled: float
    revoked_at: float | None
    revoked_why: str
    generation_floor: int
    chain_n: int
    chain_hash: str
    columns: dict[str, Any]


@dataclass(frozen=True, slots=True)
class OrderRow:
    """An order. `args` and `selector` are JSON texts; `nodes` is how many rows it was made with."""

    id: str
    kind: str  # job | command
    name: str  # the module, or the command's type
    version: str
    digest: str
    target: str
    args: str
    selector: str
    nodes: int
    deadline_s: float
    lapse_at: float
    made: float
    made_by: str
    cancelled_at: float | None = None
    cancelled_by: str = ""


@dataclass(frozen=True, slots=True)
class Word:
    """A node's last word about a row. `result` is JSON as the node sent it, `output` the row's tail."""

    id: str
    node: str
    ok: bool
    code: str
    text: str
    result: str
    output: str
