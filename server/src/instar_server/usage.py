"""Wrong words on a command line, told in one line as refusals are; typer itself draws a box of five."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup


class OneLine(TyperGroup):
    """The class (`cls`) of `instar-server`. Help, and every other status, is as typer has it."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run what the words say, and exit with its status; if not `standalone_mode`, as typer does it."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        try:
            status = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.TyperException as error:
            if said := error.format_message():  # '': there were no words at all, and the help is out
                typer.echo(f"instar-server: {in_one_line(said, error)}", err=True)
            status = error.exit_code
        except typer.Abort:
            typer.echo("instar-server: aborted", err=True)
            status = 1
        sys.exit(status)


def in_one_line(said: str, error: typer.TyperException) -> str:
    """typer's own words, and where help is: on the command, where typer tells which one it was."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "instar-server"
    words = " ".join(said.split()).rstrip(".")
    return f"{words[:1].lower()}{words[1:]} (see '{command} --help')"
