"""`python -I -S instar-recovery.pyz --state DIR --order FILE`: replace this node's releases, whatever is broken.

It fetches with the channel's certificate pinned, takes the updater's role, and drives the ordinary
transaction with its own fresh code; then the updater has its role back. docs/protocol.md, 'The frozen part',
holds the command line, the order file and what is said on stdout. Exit 0: all lines are done.

`instar-recovery.pyz verify …` is the one-shot child that this uses: TUF in a process of its own.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from instar.core.errors import InputError, InstarError, MachineError, ServerUnreachable
from instar.core.journal import Progress
from instar.core.settings import Settings
from instar.engine.journal import Journals
from instar.engine.target import NotNow
from instar.host import logs
from instar.host.clock import Clock
from instar.host.files import make_folder
from instar.host.layout import Layout
from instar.host.locks import RoleLock
from instar.host.program import Program, running_program
from instar.host.records import read_config, read_node
from instar.host.services import services_of
from instar.rescue.archive import Archives
from instar.rescue.lines import Lines
from instar.rescue.order import Order, read_order
from instar.rescue.role import UpdatersRole
from instar.rescue.server import RescueServer
from instar.rescue.voice import Voice
from instar.targets.kit import Kit
from instar.updater.reporter import Reporter

USAGE = "usage: instar-recovery.pyz --state DIR --order FILE"
LIFE_S = 900.0  # as long as an agent lets it run: also where that agent is gone
REPORT_WITHIN_S = 5.0
ALONE_WITHIN_S = 1.0

log = logging.getLogger("instar.rescue")


def main(argv: list[str]) -> int:
    if argv[:1] == ["verify"]:
        from instar.oneshot import verify

        return verify.main(argv[1:])
    voice = Voice()
    logs.set_up("text")
    signal.signal(signal.SIGTERM, _end)
    try:
        if len(argv) != 4 or argv[0] != "--state" or argv[2] != "--order":
            raise InputError("usage", USAGE)
        _bound_life()
        order = read_order(Path(argv[3]))
        rescue(Layout(Path(argv[1]).absolute()), order, running_program(sys.argv[0]), voice)
    except InstarError as error:
        return _failed(voice, error)
    except NotNow as later:
        return _failed(voice, ServerUnreachable(later.reason.code, later.reason.text))
    except OSError as error:
        return _failed(voice, MachineError("machine", f"cannot go on: {error}"))
    except SystemExit:
        return _failed(voice, MachineError("interrupted", "it was told to stop"))
    voice.ended(True)
    return 0


def rescue(layout: Layout, order: Order, program: Program, voice: Voice) -> None:
    """Raises InstarError or NotNow; the updater has its role back in any case."""
    clock, node = Clock(), read_node(layout)  # before anything is made: a wrong --state changes nothing
    make_folder(layout.run, 0o700)
    make_folder(layout.journal, 0o700)
    with RoleLock(layout.role_lock("rescue")) as alone:
        _alone(alone)
        settings, services = _settings(layout), services_of(layout, clock)
        server = RescueServer(layout, program, order, node.server, settings.network)
        archives, role = Archives(layout, order), UpdatersRole(layout, clock, services)
        archives.clear(keep=True)
        try:
            archives.bring(server, settings.network, voice)
            voice.progress("take-over")
            role.take()
            kit = Kit(layout, clock, services, server, settings, program, time.sleep)
            told = Told(voice, server, Journals(layout.journal, clock), settings)
            try:
                Lines(kit, order, role, told).replace(archives.path, told.stop)
            finally:
                told.stop()
        except InstarError as error:
            if not isinstance(error, ServerUnreachable):  # then the next core goes on with what came
                archives.clear()
            raise
        finally:
            _give_back(role)
        archives.clear()


class Told:
    """Implements `instar.engine.driver.Follower`: whoever listens on stdout hears of it, and the server."""

    def __init__(self, voice: Voice, server: RescueServer, journals: Journals, settings: Settings) -> None:
        floor_s, cap_s = settings.updater.retry_floor_s, settings.updater.retry_cap_s
        self._voice = voice
        self._reporter = Reporter(server.another(), journals, floor_s, cap_s)
        self._reporter.start()

    def changed(self, progress: Progress) -> None:
        self._voice.changed(progress)
        self._reporter.changed(progress)

    def stop(self) -> None:
        """Let the server be told what there is, for a while. Idempotent."""
        self._reporter.stop(REPORT_WITHIN_S)


def _alone(lock: RoleLock) -> None:
    try:
        lock.acquire(ALONE_WITHIN_S)
    except MachineError:
        raise MachineError("busy", "cannot begin: another recovery core is at work on this node") from None


def _settings(layout: Layout) -> Settings:
    try:
        return read_config(layout)
    except InputError as error:
        log.error("%s; going on with the defaults", error.text)
        return Settings()


def _give_back(role: UpdatersRole) -> None:
    """What the core came for is decided: an updater that does not start changes nothing about that."""
    try:
        role.give_back()
    except (InstarError, OSError) as error:
        log.error("the updater was not started: %s", error)


def _failed(voice: Voice, error: InstarError) -> int:
    log.error("%s (%s)", error.text, error.code)
    voice.ended(False, error.code, error.text)
    return error.exit_status


def _bound_life() -> None:
    """Nobody may be left to end this process, when the agent that started it is gone."""
    for after_s, number in ((LIFE_S, signal.SIGTERM), (LIFE_S + 60.0, signal.SIGKILL)):
        timer = threading.Timer(after_s, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()


def _end(*_: object) -> None:
    sys.exit(MachineError.exit_status)  # every step may be cut off anywhere
