"""The demo's report: what was wanted, what came of it, and what every node really runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class StepReport:
    """`outcome` is installed, updated, refused (never activated), reverted (activated and undone), answered,
    restarted or wrong. `wanted`: a version of the node program, or a module and its version.

    `nodes` maps a node's id to the program digest that its agent runs, read from /proc.
    """

    name: str
    wanted: str
    outcome: str = "wrong"
    reason: str = ""
    nodes: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Report:
    ok: bool = False
    seconds: float = 0.0
    steps: list[StepReport] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": round(self.seconds, 1)}

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
