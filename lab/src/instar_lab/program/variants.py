"""Builds of the node program that are broken on purpose, each in one way.

>>> sorted(VARIANTS)
['crashes-once-activated', 'does-not-start', 'hangs', 'killed-at', 'wrong-reply']
"""

from __future__ import annotations

import importlib.resources

from instar.core.errors import InputError
from instar_lab.program import build, wrappers

VARIANTS = {
    "does-not-start": "the agent and the updater end at once with an error",
    "hangs": "the agent and the updater do nothing and ignore TERM",
    "wrong-reply": "the runner's selftest gives a wrong answer",
    "crashes-once-activated": "rehearsals work, the resident programs abort one second after their start",
    "killed-at": "a sound program that kills itself where a plan says",
}


def variant(name: str, version: str) -> build.Program:
    """Build the variant `name` as `version`. Raises InputError for a name that is not in VARIANTS."""
    if name not in VARIANTS:
        raise InputError(
            "unknown-variant", f"cannot build: expected one of {', '.join(VARIANTS)}, got {name!r}"
        )
    file = importlib.resources.files(wrappers) / f"{name.replace('-', '_')}.py"
    return build.build(version, wrap=file.read_text(encoding="utf-8"))
