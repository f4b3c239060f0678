"""The shapes of names that come from outside. Each check returns the name or raises InputError."""

from __future__ import annotations

import re

from instar.core import modules
from instar.core.errors import InputError

LINES = ("agent", "updater")
MODULE_LINE = modules.PREFIX
MOST_LINE = len(MODULE_LINE) + modules.MOST_NAME
MOST_BOOT_ID = 64
PHASES = ("rehearsal", "trial")
PROGRAM_ROLES = ("agent", "updater", "rehearsal", "cli")

NODE_PATTERN = r"^n-[0-9a-f]{16}$"
GROUP_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
OPERATOR_PATTERN = GROUP_PATTERN
MODULE_PATTERN = f"^{modules.NAME.pattern}$"  # at most MOST_NAME characters
LINE_PATTERN = f"^(?:agent|updater|{MODULE_LINE}{modules.NAME.pattern})$"  # at most MOST_LINE characters
VERSION_PATTERN = r"^[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}$"
SHA256_PATTERN = r"^[0-9a-f]{64}$"

_DIGEST = re.compile(r"[0-9a-f]{96}")
_TX = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,99}")
_URI = re.compile(r"instar://node/(n-[0-9a-f]{16})")
_TARGET = re.compile(r"(?:[0-9A-Za-z][0-9A-Za-z._-]{0,127}/){0,4}[0-9A-Za-z][0-9A-Za-z._-]{0,199}")


def _matched(pattern: str | re.Pattern[str], what: str, value: str) -> str:
    if re.fullmatch(pattern, value) is None:
        raise InputError(f"bad-{what}", f"cannot use {what} {value[:120]!r}: it has a wrong form")
    return value


def node_id(value: str) -> str:
    return _matched(NODE_PATTERN.strip("^$"), "node", value)


def group_name(value: str) -> str:
    return _matched(GROUP_PATTERN.strip("^$"), "group", value)


def version(value: str) -> str:
    return _matched(VERSION_PATTERN.strip("^$"), "version", value)


def digest(value: str) -> str:
    return _matched(_DIGEST, "digest", value)


def transaction(value: str) -> str:
    return _matched(_TX, "tx", value)


def boot_id(value: str) -> str:
    if not 0 < len(value) <= MOST_BOOT_ID or not value.isprintable():
        raise InputError("bad-boot-id", f"cannot use boot_id {value[:120]!r}: it has a wrong form")
    return value


def line(value: str) -> str:
    """`agent`, `updater` or `module/<name>`."""
    if len(value) > MOST_LINE:
        raise InputError("bad-line", f"cannot use line {value[:120]!r}: it is too long")
    return _matched(LINE_PATTERN.strip("^$"), "line", value)


def module_of(line_: str) -> str | None:
    """The module that a line is about; None: it is the agent's or the updater's."""
    return line_.removeprefix(MODULE_LINE) if line_.startswith(MODULE_LINE) else None


def target_path(value: str) -> str:
    """A path below the targets folder: no empty part, none that starts with a dot."""
    return _matched(_TARGET, "path", value)


def one_of(what: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise InputError(
            f"bad-{what}", f"cannot use {what} {value[:120]!r}: expected one of {', '.join(allowed)}"
        )
    return value


def node_of_uri(uri: str) -> str | None:
    """The node that `instar://node/<id>` names, or None."""
    match = _URI.fullmatch(uri)
    return match[1] if match else None
