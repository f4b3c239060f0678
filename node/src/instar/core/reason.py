"""Why something came to be as it is. A file of its own, because every start of a daemon reads it."""

from __future__ import annotations

from instar.core.light import dataclass


@dataclass(frozen=True, slots=True)
class Reason:
    """Why: a code for machines, a text for people."""

    code: str
    text: str
