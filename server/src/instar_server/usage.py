"""Wrong words on a command line, told in one line as refusals are; typer itself draws a box of five.

What a command refuses by itself it tells by itself; here is what typer refuses before there is a command to ask:
unknown commands and options, missing or wrong values, and a prompt that was broken off.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

BROKEN_OFF = 1


class OneLine(TyperGroup):
    """The class (`cls`) of a program's group of all commands. Help, and every other status, is as typer has it."""

    program = "instar-server"

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
        words = sys.argv[1:] if args is None else list(args)
        if not standalone_mode:
            return super().main(words, prog_name, complete_var, False, windows_expand_args, **extra)
        try:
            status = super().main(words, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.TyperException as error:
            if said := error.format_message():  # '': there were no words at all, and the help is out
                self.refuse(self._in_one_line(said, error), words)
            status = error.exit_code
        except typer.Abort:
            typer.echo(f"{self.program}: broken off", err=True)
            status = BROKEN_OFF
        sys.exit(status or 0)

    def refuse(self, text: str, words: Sequence[str]) -> None:
        """Tell what is wrong with the words."""
        typer.echo(f"{self.program}: {text}", err=True)

    def _in_one_line(self, said: str, error: typer.TyperException) -> str:
        """typer's own words, and where help is: on the command, where typer tells which one it was."""
        text = " ".join(said.split()).removesuffix(".")
        return f"{text[:1].lower()}{text[1:]} (see '{self._path(getattr(error, 'ctx', None))} --help')"

    def _path(self, context: Any) -> str:
        """The command of a typer context (or None) as it is typed, however the program was started."""
        names: list[str] = []
        while context is not None and context.parent is not None:
            names.insert(0, context.info_name or "")
            context = context.parent
        return " ".join([self.program, *names])
