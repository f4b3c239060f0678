"""What the update test is asked for: everything is checked before anything is started."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from instar.cli import scripts, units
from instar.core.errors import InputError, InstarError
from instar.host.layout import Layout
from instar_lab.node import LONGEST_STATE
from instar_lab.updatetest import builds
from instar_lab.updatetest.builds import Build

T = TypeVar("T")
MODES = ("pull", "native", "recovery")
LINES = {"agent": ("agent",), "updater": ("updater",), "both": ("updater", "agent")}
SYSTEM = Layout(Path("/var/lib/instar"))
LONGEST_DELAY_MS = 3_600_000.0
SHORTEST_S, LONGEST_S = 1.0, 3600.0  # of one cycle
NODE = "node"  # the scratch node's folder

HELP = """\
Plays a server on this machine, installs an agent against it, and updates that agent over and over: waits for
a random time, orders the update, notices that the agent goes and comes back, checks the hash that it then
reports, and waits until the update is confirmed. Says what it updates to, and how long everything took.
In the end, also after Ctrl-C or a failure, the agent is uninstalled and nothing is left.

  instar-lab update-test                            ten updates; each to a build with a number of its own
  instar-lab update-test --count 200 --max-delay 20 many, in quick succession
  instar-lab update-test --alternate old.pyz        from this tree to old.pyz, back, and so on
  instar-lab update-test --program a.pyz --alternate b.pyz --count 6
  instar-lab update-test --mode recovery            by a recovery core, with its download in percent
  sudo instar-lab update-test --system --count 0    with this machine's service manager, until Ctrl-C

'instar-lab build' makes the files for --program and --alternate. Exit status: 0 when every update ended on
the wanted hash, 2 for wrong parameters, 130 when interrupted (0 with --count 0), another one when an update
did not end as it should: the last line says why."""


@dataclass(frozen=True, slots=True)
class Options:
    """Seconds and counts; `count` 0 means until interrupted. `lines` in the order in which they are updated."""

    count: int
    delay_s: tuple[float, float]
    hold_s: float
    timeout_s: float
    mode: str
    lines: tuple[str, ...]
    system: bool
    as_json: bool
    keep: Path | None
    first: Build
    alternate: Build | None


def add_to(parser: argparse.ArgumentParser) -> None:
    """Values stay text here: `check` says what is wrong with them in fewer words."""
    parser.add_argument(
        "--count", default="10", metavar="N", help="updates; 0: until Ctrl-C (default %(default)s)"
    )
    parser.add_argument(
        "--min-delay", default="0", metavar="MS", help="least wait before one (default %(default)s)"
    )
    parser.add_argument("--max-delay", default="100", metavar="MS", help="longest wait (default %(default)s)")
    parser.add_argument(
        "--program", metavar="FILE", help="the build to start with (default: built from this tree)"
    )
    parser.add_argument(
        "--alternate", metavar="FILE", help="another build: from the one to the other, and back"
    )
    parser.add_argument(
        "--mode", default="pull", metavar="MODE",
        help="how the bytes come: pull (fetched by the node), native (through the control channel) or recovery "
        "(by a recovery core) (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--line",
        default="agent",
        metavar="LINE",
        help="what is updated: agent, updater or both (default %(default)s)",
    )
    parser.add_argument(
        "--hold", default="0.2", metavar="S",
        help="how long a new one must run before it is confirmed (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", default="60", metavar="S", help="most for one update (default %(default)s)"
    )
    parser.add_argument(
        "--system", action="store_true",
        help="install for this machine's service manager, below /var/lib/instar; needs root",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object a line, the summary last")
    parser.add_argument("--keep", metavar="DIR", help="work in this new folder and leave it, with all logs")


class _Wrong:
    """Gathers what is wrong, so that all of it can be said at once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def of(self, make: Callable[..., T], *arguments: Any, otherwise: T) -> T:
        try:
            return make(*arguments)
        except InstarError as error:
            self.texts.append(error.text)
            return otherwise

    def unless(self, fits: bool, text: str) -> None:
        if not fits:
            self.texts.append(text)

    def say(self) -> None:
        """Raises InputError when anything is."""
        if self.texts:
            raise InputError("bad-parameters", "; ".join(self.texts))


def check(given: argparse.Namespace) -> Options:
    """Raises InputError `bad-parameters` that names everything that is wrong or missing."""
    wrong = _Wrong()
    count = wrong.of(_whole, "--count", given.count, 1_000_000, otherwise=1)
    least = wrong.of(_number, "--min-delay", given.min_delay, 0, LONGEST_DELAY_MS, otherwise=0.0)
    most = wrong.of(_number, "--max-delay", given.max_delay, 0, LONGEST_DELAY_MS, otherwise=LONGEST_DELAY_MS)
    wrong.unless(least <= most, f"expected --min-delay <= --max-delay, got {least:g} and {most:g}")
    timeout_s = wrong.of(_number, "--timeout", given.timeout, SHORTEST_S, LONGEST_S, otherwise=LONGEST_S)
    hold_s = wrong.of(_number, "--hold", given.hold, 0.0, LONGEST_S, otherwise=0.0)
    wrong.unless(hold_s < timeout_s, f"expected --hold < --timeout, got {hold_s:g} and {timeout_s:g}")
    wrong.unless(given.mode in MODES, f"expected --mode {_either(MODES)}, got {given.mode!r}")
    wrong.unless(given.line in LINES, f"expected --line {_either(tuple(LINES))}, got {given.line!r}")
    for name, what in (("program", "file"), ("alternate", "file"), ("keep", "folder")):
        wrong.unless(getattr(given, name) != "", f"expected --{name} as a {what}, got ''")
    keep = Path(given.keep).absolute() if given.keep else None
    if keep is not None:
        wrong.texts += _why_not_keep(keep)
    if given.system:
        wrong.texts += _why_not_system()
    first = wrong.of(builds.read, Path(given.program), otherwise=None) if given.program else None
    alternate = wrong.of(builds.read, Path(given.alternate), otherwise=None) if given.alternate else None
    if first and alternate:
        wrong.texts += _why_not_both(first, alternate)
    wrong.say()
    return Options(
        count, (least / 1000, most / 1000), hold_s, timeout_s, given.mode, LINES[given.line], given.system,
        given.json, keep, first or _from_tree(alternate), alternate,
    )  # fmt: skip


def _either(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _whole(name: str, text: str, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) <= most):
        raise InputError("bad-number", f"expected {name} as a whole number from 0 to {most}, got {text!r}")
    return int(text)


def _number(name: str, text: str, least: float, most: float) -> float:
    value = math.nan
    with contextlib.suppress(ValueError):
        value = float(text)
    if not least <= value <= most:
        raise InputError(
            "bad-number", f"expected {name} as a number from {least:g} to {most:g}, got {text!r}"
        )
    return value


def _why_not_keep(keep: Path) -> list[str]:
    if len(os.fsencode(keep / NODE)) > LONGEST_STATE:
        return [f"expected --keep in at most {LONGEST_STATE - len(NODE) - 1} bytes, got {keep}"]
    try:
        if not keep.exists() or not any(keep.iterdir()):
            return []
    except OSError as error:
        return [f"cannot use --keep {keep}: {error.strerror}"]
    return [f"expected --keep to be new or empty, and {keep} holds something"]


def _why_not_system() -> list[str]:
    if os.getuid() != 0:
        return ["--system needs root: expected user id 0, got " + str(os.getuid())]
    manager = "systemd" if units.systemd_runs() else scripts.found()
    if manager == "none":
        return ["--system needs a service manager, and none that Instar knows runs here; go without --system"]
    if (units.installed() if manager == "systemd" else scripts.installed(manager)) or SYSTEM.node.exists():
        return ["--system: a node is installed on this machine already, and is left alone"]
    if SYSTEM.state.exists() and any(SYSTEM.state.iterdir()):
        return [f"--system: expected {SYSTEM.state} to be absent or empty, and it holds something"]
    return []


def _why_not_both(first: Build, alternate: Build) -> list[str]:
    if first.digest == alternate.digest:
        return [f"expected two different builds, and --program and --alternate are both {first.short}"]
    if first.version == alternate.version:
        return [
            f"expected builds with different versions, and both are {first.version}: build one anew with another"
        ]
    return []


def _from_tree(alternate: Build | None) -> Build:
    """With a version that the alternate one does not have: what is published under a version never changes."""
    made = builds.from_tree()
    if alternate is None or made.version != alternate.version:
        return made
    return builds.numbered(made, 1)
