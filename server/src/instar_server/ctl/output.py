"""How commands speak: tables for people, JSON with --json; an error is one line on stderr, or JSON too."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from instar.core.errors import InstarError
from instar_server.ctl.client import Client, find_access

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


WIDEST = 100_000  # characters: of a console that is no terminal, so that nothing is cut or wrapped there
# Columns of ids and states, which people copy and programs look for: never cut, never broken.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 and C1 without tab and newline
WHOLE = frozenset({"node", "state", "token", "order", "transaction", "update", "phase", "slot", "name"})


def console(stderr: bool = False) -> Console:
    """Standard output (or error): as wide as the terminal is now, or as what is written needs."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if terminal else WIDEST)


@dataclass(frozen=True)
class Options:
    """Where the server is and who asks, as far as it was said; before the command's name, or after it."""

    server: str | None = None
    token_file: Path | None = None
    ca: Path | None = None


def given(context: typer.Context, own: Options | None = None) -> Options:
    """What a command's own options say, else those before its name. A server that was named is never left out."""
    own, before = own or Options(), context.find_root().obj or Options()
    return Options(
        before.server if own.server is None else own.server,
        before.token_file if own.token_file is None else own.token_file,
        before.ca if own.ca is None else own.ca,
    )


def tell_error(
    error: InstarError, as_json: bool, shown: Mapping[str, Any] | None = None, with_code: bool = True
) -> None:
    """One line on stderr; with --json one document on stdout, which has `shown` in it beside the error."""
    if as_json:
        typer.echo(json.dumps({**(shown or {}), "error": error.as_json()}))
    else:
        typer.echo(plain(f"instarctl: {error.text}" + (f" [{error.code}]" if with_code else "")), err=True)


def refuse(error: InstarError, as_json: bool, shown: Mapping[str, Any] | None = None) -> NoReturn:
    """Tell the error and end the command with its status."""
    tell_error(error, as_json, shown)
    raise typer.Exit(error.exit_status)


@contextlib.contextmanager
def plain_errors(as_json: bool) -> Iterator[None]:
    """A refusal is one line, or JSON, and its own exit status."""
    try:
        yield
    except InstarError as error:
        refuse(error, as_json)


@contextlib.contextmanager
def connected(context: typer.Context, own: Options | None = None) -> Iterator[Client]:
    """A client for the server that the options, the environment or the configuration name; with `plain_errors`, as
    the command's --json says."""
    options = given(context, own)
    with (
        plain_errors(bool(context.params.get("as_json"))),
        Client(find_access(options.server, options.token_file, options.ca)) as client,
    ):
        yield client


def plain(text: str) -> str:
    """Without control characters: what a node says must not clear, name or write over an operator's terminal."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def show(data: Any, as_json: bool, table: Callable[[], RenderableType]) -> None:
    """Print `data` as JSON, or what `table` makes."""
    if as_json:
        typer.echo(json.dumps(data, indent=2, sort_keys=True))
    else:
        print_whole(table())


def print_whole(what: RenderableType) -> None:
    """On standard output: text as it is, for there may be brackets or a long path in it; a table, if it cannot be
    narrower than the terminal, wider than that."""
    if isinstance(what, str):
        typer.echo(plain(what))
    else:
        console().print(what, crop=False)


class WholeTable(Table):
    """As wide as there is room, but never narrower than the `min_width` of its columns: rich would cut them."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Each column has a blank on both sides, and a line before it."""
        needed = 1 + sum((column.min_width or 0) + 3 for column in self.columns)
        yield from super().__rich_console__(console, options.update(max_width=max(options.max_width, needed)))


def make_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> Table:
    """A table that cuts nothing: ids and states stay on one line, all else is folded where there is no room."""
    # As it is: what nodes and people wrote is no markup.
    cells = [
        [cell if isinstance(cell, Text) else Text("" if cell is None else plain(str(cell))) for cell in row]
        for row in rows
    ]
    table = WholeTable(title=title or None, title_justify="left")
    for at, name in enumerate(columns):
        whole = name in WHOLE
        widths = [cell_len(name), *(row[at].cell_len for row in cells if whole)]
        table.add_column(name, no_wrap=whole, overflow="fold", min_width=max(widths))
    for row in cells:
        table.add_row(*row)
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
    """A bar on stderr if that is a terminal; call what it gives with (bytes done, bytes in all)."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    shown = console(stderr=True)
    with Progress(*columns, console=shown, disable=quiet or not shown.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
