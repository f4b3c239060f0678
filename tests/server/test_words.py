"""The examples that --help shows can be typed as they stand, and ask modules what they can be asked."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from instar_server.ctl import words
from instar_server.ctl.jobs import arguments_of
from instar_server.ctl.main import app

MODULES = Path(__file__).resolve().parents[2] / "modules"
LINES = sorted(
    line.removeprefix("$ instarctl ")
    for text in (words.FIRST_DAY, *words.EXAMPLES.values())
    for line in text.splitlines()
    if line.startswith("$ instarctl ")
)


def parsed(line: str) -> dict[str, Any]:
    """The options of the line's command, which is not run. Raises typer's usage error for words it does not know."""
    command: Any = typer.main.get_command(app)
    context, rest = None, shlex.split(line)
    while True:
        context = command.make_context(command.name, rest, parent=context)
        if not hasattr(command, "resolve_command"):
            return dict(context.params)
        _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])


@pytest.mark.parametrize("line", LINES)
def test_an_example_is_what_the_command_takes(line: str) -> None:
    options = parsed(line)
    if line.startswith("job run"):
        about = tomllib.loads((MODULES / options["module"] / "module.toml").read_text())
        words_of_it = set(about["about"].replace("(", " ").replace(",", " ").replace(")", " ").split())
        asked = arguments_of(options["arguments"] or [], None)
        assert {value if name == "do" else name for name, value in asked.items()} <= words_of_it, asked


def test_a_wrong_word_would_be_found() -> None:
    with pytest.raises(Exception, match="No such option: --depth"):
        parsed("job run disk.usage --depth 2")
