"""What the core itself can be told to do, and how that stands. Pure: values in, values out.

A command goes through `TABLE` and nothing else; docs/modules-lifecycle.md is generated from it. The worked
example, a restart of the agent that is killed while it is under way:

    PENDING -begun-> IN_PROGRESS (on the disk before anything is stopped)
    … killed; the next agent finds it so, waits for the modules …
    -done-> SUCCESS (kept until the server has acknowledged it)
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from instar.core.errors import InputError

RESTART_AGENT, RESTART_MODULE = "restart-agent", "restart-module"
TYPES = (RESTART_AGENT, RESTART_MODULE)
WITHIN_S = (1.0, 600.0)  # what a command may ask for as the bound of the whole
MOST_MODULES = 64  # named in one command
MOST_TRIES = (
    3  # beginnings of a restart-module: one that takes the agent down with it must not do so for ever
)
STOP_SHARE = 2 / 3  # of the whole bound; the rest is for starting again


class Status(Enum):
    PENDING = "pending"  # on the disk; others come first
    IN_PROGRESS = "in-progress"
    SUCCESS = "success"
    FAILURE = "failure"
    TIMEOUT = "timeout"  # the bound has passed; what was left of it was killed and started again


class Event(Enum):
    BEGUN = "begun"
    DONE = "done"
    FAILED = "failed"
    LATE = "late"


FINAL = frozenset({Status.SUCCESS, Status.FAILURE, Status.TIMEOUT})

TABLE: dict[tuple[Status, Event], Status] = {
    (Status.PENDING, Event.BEGUN): Status.IN_PROGRESS,
    (Status.PENDING, Event.FAILED): Status.FAILURE,
    (Status.IN_PROGRESS, Event.BEGUN): Status.IN_PROGRESS,  # cut off, and done again
    (Status.IN_PROGRESS, Event.DONE): Status.SUCCESS,
    (Status.IN_PROGRESS, Event.FAILED): Status.FAILURE,
    (Status.IN_PROGRESS, Event.LATE): Status.TIMEOUT,
}

# What the next agent does with one that it finds in progress.
RESUMED: dict[str, str] = {
    RESTART_AGENT: "ended as soon as the modules run again, within what is left of its bound",
    RESTART_MODULE: f"done again, {MOST_TRIES} times at most",
}


class Verdict(NamedTuple):
    event: Event
    code: str = ""
    text: str = ""


def after(status: Status, event: Event) -> Status:
    """The status that follows. Raises ValueError for what cannot happen: nothing follows a final one."""
    try:
        return TABLE[status, event]
    except KeyError:
        raise ValueError(f"cannot have '{event.value}' of a command that is {status.value}") from None


def check(kind: str, modules: list[str], within_s: float) -> None:
    """Raise InputError `bad-command` for a command that nobody could obey."""
    if kind not in TYPES:
        known = " or ".join(TYPES)
        raise InputError("bad-command", f"cannot obey: expected the type {known}, got {kind!a:.40}")
    if len(modules) > MOST_MODULES:
        text = f"cannot obey: expected at most {MOST_MODULES} modules, got {len(modules)}"
        raise InputError("bad-command", text)
    low, high = WITHIN_S
    if not low <= within_s <= high:
        text = f"cannot obey: expected within_s of {low:g} to {high:g}, got {within_s!r:.40}"
        raise InputError("bad-command", text)


def verdict(modules: Mapping[str, str], spent_s: float, within_s: float) -> Verdict:
    """How a restart ended. `modules` is name -> 'running' or why not; seconds are those of the whole."""
    down = {name: words for name, words in modules.items() if words != "running"}
    if spent_s > within_s:
        state = f"{', '.join(down)} not running" if down else "everything runs again"
        text = f"cannot restart within {within_s:g} s: it took {spent_s:.1f} s; {state}"
        return Verdict(Event.LATE, "timeout", text)
    if down:
        words = "; ".join(f"{name}: {why}" for name, why in down.items())
        return Verdict(Event.FAILED, "module-failed", f"cannot restart: {words}"[:1000])
    return Verdict(Event.DONE)
