"""What is sent to a node about a row of an order, as the text of a frame (docs/protocol.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from instar.wire.messages import Cancel, Command, Job
from instar_server.domain.orders import JOB

LEAST_LAPSE_S = 1.0

_encode = msgspec.json.Encoder().encode


def frame_of(row: Mapping[str, Any], now: float) -> str:
    """The job, command or cancel of a row that carries its order's columns (`storage.orders`)."""
    if row["cancelled_at"] is not None:
        return cancel(row["id"])
    if row["kind"] == JOB:
        body: dict[str, Any] = {
            "t": Job.T, "id": row["id"], "module": row["name"], "purpose": "job",
            "args": msgspec.Raw(row["args"].encode()), "deadline_s": row["deadline_s"],
            "version": row["version"], "digest": row["digest"], "target": row["target"],
            "lapse_s": max(LEAST_LAPSE_S, round(row["lapse_at"] - now, 3)),
        }  # fmt: skip
    else:
        body = {
            "t": Command.T, "id": row["id"], "type": row["name"], **json.loads(row["args"]),
            "origin": f"server:{row['made_by']}", "within_s": row["deadline_s"],
        }  # fmt: skip
    return _encode(body).decode()


def cancel(id_: str) -> str:
    return _encode({"t": Cancel.T, "id": id_}).decode()
