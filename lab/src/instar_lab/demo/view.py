"""What a person sees: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

LONG_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{20,}")


@dataclass(frozen=True, slots=True)
class Row:
    """One node now."""

    node: str
    state: str
    agent: str  # version and first digits of the digest
    updater: str
    doing: str  # the last thing that its history says


STATE_STYLE = {"connected": "green", "offline": "red", "never-seen": "dim"}


class View:
    """A context manager. `say` and `settle` are for lines that stay; `show` replaces the live table."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._headline = ""
        self._told: dict[str, str] = {}

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def headline(self, text: str) -> None:
        """What is going on now."""
        self._headline = text
        if self._live is None:
            self._print(text)
        else:
            self._live.update(Text(text, style="bold"))

    def say(self, text: str, style: str = "") -> None:
        """A line that stays."""
        self._print(text, style)

    def show(self, rows: Sequence[Row]) -> None:
        """The nodes as they are now. Without a terminal, only what changed is told."""
        if self._live is not None:
            self._live.update(Group(Text(self._headline, style="bold"), table(rows)))
            return
        for row in rows:
            if row.doing and self._told.get(row.node) != row.doing:
                self._told[row.node] = row.doing
                self._print(f"    {row.node}  {row.doing}")

    def _print(self, text: str, style: str = "") -> None:
        """Long hexadecimal digests are cut: the report and the history have them whole."""
        text = LONG_DIGEST.sub(r"\1…", text)
        self._console.print(Text(text, style=style), soft_wrap=True)


def table(rows: Sequence[Row]) -> Table:
    drawn = Table(expand=False, pad_edge=False)
    for title in ("node", "state", "agent", "updater", "last"):
        drawn.add_column(title, no_wrap=title != "last", overflow="ellipsis")
    for row in rows:
        state = Text(row.state, style=STATE_STYLE.get(row.state, ""))
        drawn.add_row(row.node, state, row.agent, row.updater, row.doing)
    return drawn
