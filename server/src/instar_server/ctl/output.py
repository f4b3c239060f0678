"""How commands speak: tables for people, JSON with --json, one line for an error."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from instar.core.errors import InstarError
from instar_server.ctl.client import Client, find_access

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def console() -> Console:
    """Standard output, as wide as it is now."""
    return Console()


@dataclass
class Options:
    """What stands before the command's name."""

    server: str | None = None
    token_file: Path | None = None
    ca: Path | None = None


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """A refusal is one line on stderr, and its own exit status."""
    try:
        yield
    except InstarError as error:
        typer.echo(f"instarctl: {error.text} [{error.code}]", err=True)
        raise typer.Exit(error.exit_status) from None


@contextlib.contextmanager
def connected(context: typer.Context) -> Iterator[Client]:
    """A client for the server that the options, the environment or the configuration name."""
    options: Options = context.find_root().obj or Options()
    with plain_errors(), Client(find_access(options.server, options.token_file, options.ca)) as client:
        yield client


def show(data: Any, as_json: bool, table: Callable[[], RenderableType]) -> None:
    """Print `data` as JSON, or what `table` makes."""
    if as_json:
        typer.echo(json.dumps(data, indent=2, sort_keys=True))
    else:
        console().print(table())


def make_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> Table:
    table = Table(*columns, title=title or None, title_justify="left")
    for row in rows:
        # As it is: what nodes and people wrote is no markup.
        table.add_row(
            *(cell if isinstance(cell, Text) else Text("" if cell is None else str(cell)) for cell in row)
        )
    return table


def when(moment: float | None, now: float | None = None) -> str:
    """How long ago or ahead a unix time is, in words."""
    if moment is None:
        return "never"
    seconds = moment - (time.time() if now is None else now)
    amount, unit = abs(seconds), "s"
    for size, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if amount >= size:
            amount, unit = amount / size, name
            break
    return f"in {amount:.0f} {unit}" if seconds > 0 else f"{amount:.0f} {unit} ago"


def short(digest: str) -> str:
    return digest[:12]


@contextlib.contextmanager
def progress_bar(what: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; call what it gives with (bytes done, bytes in all)."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
