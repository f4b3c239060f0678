"""The one way into `instarctl`, and out of it: words that no command takes are one line, or JSON, and status 2.

What a command refuses by itself is told by `output.plain_errors`; here is what typer refuses before there is a
command to ask: unknown commands and options, missing or wrong values, and a prompt that was broken off.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from instar.core.errors import InputError
from instar_server.ctl.output import tell_error

BROKEN_OFF = 1


class Entry(TyperGroup):
    """The group of all commands. Everything else, `--help` too, is as typer does it."""

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
            status = _usage(error, words)
        except typer.Abort:
            typer.echo("instarctl: broken off", err=True)
            status = BROKEN_OFF
        sys.exit(status or 0)


def _usage(error: typer.TyperException, words: Sequence[str]) -> int:
    """Tell what is wrong with the words; the status."""
    context = getattr(error, "ctx", None)
    status = int(getattr(error, "exit_code", InputError.exit_status))
    if (
        type(error).__name__ == "NoArgsIsHelpError"
    ):  # typer has no public name for it; the help is printed by now
        return status
    said = " ".join((error.format_message() if hasattr(error, "format_message") else str(error)).split())
    said = said[:1].lower() + said[1:].removesuffix(".")
    text = f"{said} (see '{_path(context)} --help')"
    tell_error(InputError("bad-options", text), json_wanted(words), with_code=False)
    return status


def json_wanted(words: Sequence[str]) -> bool:
    """Whether --json stands among them: not known otherwise as long as they cannot be parsed."""
    options = words[: words.index("--")] if "--" in words else words
    return "--json" in options


def _path(context: Any) -> str:
    """The command of a typer context (or None) as it is typed, however the program was started."""
    names: list[str] = []
    while context is not None and context.parent is not None:
        names.insert(0, context.info_name or "")
        context = context.parent
    return " ".join(["instarctl", *names])
