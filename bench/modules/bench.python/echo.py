"""The least that a Python module can do."""

from __future__ import annotations

from typing import Any


def run(args: dict[str, Any], context: Any) -> dict[str, Any]:
    return {"n": args.get("n", 0)}
