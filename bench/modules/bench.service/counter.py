"""A service that keeps a number: it is saved when the service stops, and found again."""

from __future__ import annotations

from typing import Any

count = 0


def start(context: Any) -> None:
    global count
    count = (context.load() or {}).get("count", 0)


def request(args: dict[str, Any], context: Any) -> dict[str, Any]:
    global count
    count += 1
    return {"count": count}


def ready_to_stop(context: Any) -> bool:
    context.save({"count": count})
    return True
