"""A module's name, and the name of its line of releases. Pure."""

from __future__ import annotations

import re

from instar.core.errors import InputError

NAME = re.compile(r"[a-z][a-z0-9]{0,30}(?:[.-][a-z0-9]{1,31}){0,3}")
MOST_NAME = 64
PREFIX = "module/"  # of a module's line, in journals, wishes, events and verdicts
MOST_MODULES = 256  # that one node keeps running


def check_name(name: str) -> str:
    """A module's name, such as `interfaces.list`; also a folder's name. Raises InputError `bad-module-name`."""
    if not NAME.fullmatch(name) or len(name) > MOST_NAME:
        form = "lower-case words joined by '.' or '-'"
        raise InputError("bad-module-name", f"cannot use module name: expected {form}, got {name!a:.80}")
    return name


def line_of(name: str) -> str:
    return f"{PREFIX}{name}"


def module_of(line: str) -> str:
    """The module whose line this is; '' for the line of something else. Raises InputError `bad-module-name`."""
    return check_name(line.removeprefix(PREFIX)) if line.startswith(PREFIX) else ""
