"""Names for the places where a kill must be survivable.

`reach` does nothing in a shipped program. A program that the lab builds replaces `listener`
to stop the process at a chosen place; no setting, file or variable of a shipped program can.
"""

from __future__ import annotations

from collections.abc import Callable

listener: Callable[[str], None] | None = None


def reach(point: str) -> None:
    """Say that the place named `point` has been reached."""
    if listener is not None:
        listener(point)
