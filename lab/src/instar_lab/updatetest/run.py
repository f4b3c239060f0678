"""Plays an update test: everything that can be checked first is, and whatever happens, all of it is taken away."""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from instar.core.errors import InstarError, MachineError
from instar.host.line import Line
from instar_lab.fleet import undisturbed
from instar_lab.program import recovery
from instar_lab.updatetest import builds, options
from instar_lab.updatetest.builds import Build
from instar_lab.updatetest.cycle import Course, Cycle
from instar_lab.updatetest.options import Options
from instar_lab.updatetest.place import Place
from instar_lab.updatetest.stream import Stream
from instar_lab.updatetest.telling import Json, Text
from instar_server.trust.pack import Release, pack_release

INTERRUPTED = 130
GROUP = "default"
QUICK = 6  # of gzip: a hundredth larger, and four times as quick


class Shelf:
    """The builds in turn, each published before it is ordered; what nobody needs any more is taken back."""

    def __init__(self, place: Place, wanted: Options) -> None:
        self._place, self._options = place, wanted
        self._published: dict[str, Release] = {}  # digest -> release, in the order of publication

    def nth(self, number: int) -> Build:
        """What cycle `number`, counted from 1, updates to; 0 is what is installed."""
        first, alternate = self._options.first, self._options.alternate
        if number == 0:
            return first
        if alternate is not None:
            return alternate if number % 2 else first
        return builds.numbered(first, number)

    def publish(self, made: Build) -> Release:
        """Idempotent. Of the others only the newest is kept: it runs, and is what the node goes back to."""
        if made.digest not in self._published:
            old = list(self._published.items())[:-1] if self._options.alternate is None else []
            release = pack_release(made.program.data, made.version, QUICK)
            self._place.server.publish_release(release, [each for _, each in old])
            for digest, _ in old:
                del self._published[digest]
            self._published[made.digest] = release
        return self._published[made.digest]


@dataclass(slots=True)
class Play:
    place: Place
    wanted: Options
    tell: Text | Json
    done: list[Cycle] = field(default_factory=list)
    now: Cycle | None = None

    def run(self) -> None:
        """All cycles. Raises InstarError when one ends wrong, KeyboardInterrupt."""
        wanted, place = self.wanted, self.place
        shelf = Shelf(place, wanted)
        shelf.publish(wanted.first)
        if wanted.mode == "recovery":
            place.server.publish_recovery(recovery.build_core(wanted.first.version))
        with Stream(place.server.access) as stream:
            by = "with this machine's service manager" if wanted.system else "by hand"
            host, port = place.server.gateway()
            self.tell.installing(str(place.node.state), by, f"{host}:{port}")
            place.install(wanted.first)
            course = Course(place, stream, wanted, self.tell)
            self.tell.connected(course.connected(wanted.first))
            number = 0
            while wanted.count == 0 or number < wanted.count:
                number += 1
                self._cycle(course, shelf, number)

    def _cycle(self, course: Course, shelf: Shelf, number: int) -> None:
        origin, target = shelf.nth(number - 1), shelf.nth(number)
        release = shelf.publish(target)
        lines, delay_s = self.wanted.lines, random.uniform(*self.wanted.delay_s)
        layout = self.place.node.layout
        absent = [line for line in lines if not Line(layout.line(line)).is_valid(target.program.release)]
        # Only a node that fetches looks whether the release is there still; a core does all with one archive.
        archives = {"pull": len(absent), "native": len(lines), "recovery": 1}[self.wanted.mode]
        self.now = Cycle(number, origin, target, lines, delay_s, len(release.archive) * archives)
        course.run(self.now, self._order(target))
        self.done.append(self.now)
        self.now = None
        self.tell.done(self.done[-1])

    def _order(self, target: Build) -> Callable[[], None]:
        server, lines, mode = self.place.server, self.wanted.lines, self.wanted.mode
        return lambda: server.want(target.version, lines, GROUP, via=mode)


def play(given: argparse.Namespace) -> int:
    """The whole command; its exit status. Raises InputError when a parameter is wrong."""
    wanted = options.check(given)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # the terminal was closed
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
    tell: Text | Json = Json(wanted) if wanted.as_json else Text(wanted)
    place = Place(wanted)
    run = Play(place, wanted, tell)
    status, error = 0, None
    try:
        with place:
            status, error = _played(run, tell)
    except KeyboardInterrupt:  # before there was anything to test
        status = INTERRUPTED
    with undisturbed(), contextlib.suppress(BrokenPipeError):
        tell.uninstalled(place.fault)
    if error is not None:
        print(f"instar-lab update-test: {error.text} ({error.code})", file=sys.stderr)
    if status == INTERRUPTED:
        print("instar-lab update-test: interrupted", file=sys.stderr)
    return status or (1 if place.fault else 0)


def _played(run: Play, tell: Text | Json) -> tuple[int, InstarError | None]:
    """The exit status, and the error that ended it."""
    why, status = "", 0
    wrong: InstarError | None = None
    try:
        run.run()
    except (KeyboardInterrupt, BrokenPipeError):  # nobody reads on: the same
        why, status = "interrupted", INTERRUPTED if run.wanted.count else 0
    except (InstarError, OSError) as error:
        wrong = error if isinstance(error, InstarError) else MachineError("machine", f"cannot go on: {error}")
        with undisturbed():
            tell.failed(run.now, wrong.code, wrong.text, run.place.logs())
        why, status = wrong.code, wrong.exit_status
    with undisturbed(), contextlib.suppress(BrokenPipeError):
        tell.summary(run.done, why)
    return status, wrong
