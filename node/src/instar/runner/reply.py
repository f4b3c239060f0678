"""What a module returned, as the bytes of a reply; or why it is none.

The bounds are those of the control channel's frames (instar.wire.codec), so that a reply that is good here
reaches the server: the result around it adds two levels and at most a few kilobytes.
"""

from __future__ import annotations

import json
from typing import Any

from instar.core.errors import InstarError

MOST_REPLY = 224 << 10  # bytes of its JSON
MAX_DEPTH = 30  # of lists and objects, the reply itself counted
MOST_PARTS = 200_000  # of all lists and objects; more cannot fit, unless one part stands many times
NUMBER_BOUND = 2**63


def encode_reply(value: object) -> bytes:
    """The reply's JSON. Raises InstarError `bad-reply` for anything but an object that a frame can carry."""
    if not isinstance(value, dict):
        raise _bad("an object", type(value).__name__)
    try:
        _check(value)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError, RecursionError) as error:
        raise _bad("JSON values", f"{error!s:.120}") from error
    body = text.encode("utf-8", "replace")
    if len(body) > MOST_REPLY:
        raise _bad(f"at most {MOST_REPLY} bytes", str(len(body)))
    return body


def _check(value: dict[Any, Any]) -> None:
    """Look at all parts, level by level; a part that holds itself is deeper than any bound."""
    level: list[Any] = [value]
    seen = 0
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for part in level:
            for item in part.values() if isinstance(part, dict) else part:
                if isinstance(item, dict | list | tuple):
                    below.append(item)
                elif isinstance(item, int) and not -NUMBER_BOUND <= item < NUMBER_BOUND:
                    raise _bad("whole numbers of 64 bits", "a larger one")
            seen += len(part)
            if seen > MOST_PARTS:
                raise _bad(f"at most {MOST_REPLY} bytes", f"more than {MOST_PARTS} values")
        if not below:
            return
        level = below
    raise _bad(f"at most {MAX_DEPTH} levels", "more, or a part that holds itself")


def _bad(expected: str, got: str) -> InstarError:
    return InstarError("bad-reply", f"cannot use reply: expected {expected}, got {got}")
