"""The one way into `instarctl`, and out of it: words that no command takes are one line, or JSON, and status 2."""

from __future__ import annotations

from collections.abc import Sequence

from instar.core.errors import InputError
from instar_server.ctl.output import tell_error
from instar_server.usage import OneLine


class Entry(OneLine):
    """The group of all commands."""

    program = "instarctl"

    def refuse(self, text: str, words: Sequence[str]) -> None:
        tell_error(InputError("bad-options", text), json_wanted(words), with_code=False)


def json_wanted(words: Sequence[str]) -> bool:
    """Whether --json stands among them: not known otherwise as long as they cannot be parsed."""
    options = words[: words.index("--")] if "--" in words else words
    return "--json" in options
