"""`updater --state DIR`, and `updater --rehearse --state DIR --tx TX [--within S]`.

Only wires. Under systemd the updater is started by its socket or timer and leaves when it has had
nothing to do for IDLE_S; elsewhere it stays.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instar.core.errors import InputError, InstarError, MachineError
from instar.core.settings import Settings
from instar.engine.journal import Journals
from instar.engine.target import HandOver
from instar.host import logs, processes
from instar.host.clock import Clock
from instar.host.files import make_folder, remove_tree
from instar.host.interpreter import command
from instar.host.layout import Layout
from instar.host.locks import RoleLock
from instar.host.program import Program, running_program
from instar.host.records import read_config, read_node
from instar.host.services import services_of
from instar.host.transport import Endpoint, Transport
from instar.targets.kit import Kit
from instar.updater.api import Api
from instar.updater.client import ServerClient
from instar.updater.loop import Loop
from instar.updater.ordered import previous_release
from instar.updater.orders import Orders
from instar.updater.rehearse import rehearse
from instar.updater.reporter import Reporter
from instar.updater.targets import Targets

if TYPE_CHECKING:
    from instar.targets.slots.platform import Platform
    from instar.updater.http.calls import Services
    from instar.updater.slots import Around
    from instar.updater.system import System

LOCK_WITHIN_S = 10.0
REPORT_WITHIN_S = 0.5
IDLE_S = 5.0
TEXT = "text"  # how the log is written, unless it is said
STAY_S = 30.0  # under systemd: a retry that is due within this is waited for

log = logging.getLogger("instar.updater")


def main(argv: list[str], around: Around | None = None) -> int:
    """`around` stands in for the machine below the two slots: for tests."""
    args = _parse(argv)
    logs.set_up(args.log)
    layout, clock = Layout(args.state.absolute()), around.clock if around else Clock()
    try:
        program = running_program(sys.argv[0])
        if args.rehearse:
            return rehearse(layout, program, args.tx, args.within)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # every step may be cut off anywhere
        read_node(layout)  # before anything is made: a wrong --state changes nothing
        make_folder(layout.run, 0o700)
        with RoleLock(layout.role_lock("updater")) as lock:
            lock.acquire(LOCK_WITHIN_S)
            processes.record(
                layout.process("updater"), processes.this_process(clock.boot_id(), program.release)
            )
            try:
                _serve(layout, clock, program, around)
            except HandOver:
                _become_launcher(layout, args)
    except InstarError as error:
        print(f"instar updater: {error.text} ({error.code})", file=sys.stderr, flush=True)
        return error.exit_status
    except OSError as error:
        print(f"instar updater: {error}", file=sys.stderr, flush=True)
        return MachineError.exit_status
    return 0


def _serve(layout: Layout, clock: Clock, program: Program, around: Around | None) -> None:
    settings = _settings(layout)
    endpoint = _endpoint(layout, settings, program)

    def server() -> ServerClient:
        """One for each thread."""
        return ServerClient(Transport(endpoint), layout, program)

    client = server()
    journals = Journals(layout.journal, clock)
    services = services_of(layout, clock)
    orders = Orders(threading.Lock(), threading.Event(), layout.orders)
    kit = Kit(layout, clock, services, client, settings, program, time.sleep, brought=orders.brought)
    waits = settings.updater.retry_floor_s, settings.updater.retry_cap_s

    def report() -> dict[str, Any]:
        return system().report()

    reporter = Reporter(server(), journals, *waits, report if settings.os.disk else None)
    system = _system(kit, journals, orders, client, reporter, around)
    targets = Targets(kit, system)
    loop = Loop(layout, clock, targets, client, reporter, settings.updater, orders)

    def wiring() -> Services:
        from instar.updater.http.calls import Services

        return Services(layout, clock, program, orders, targets, journals, read_node(layout).node, server)

    api = Api(layout.socket("updater"), settings.updater.api, _handlers(program, targets, orders), wiring)
    _drop_cut_pushes(layout)
    orders.recall({journal.progress.begin.tx for journal in journals.read_all()})
    if settings.os.disk:
        system().start()
    api.start()
    reporter.start()
    log.info("updater %s (%s) is up", program.version, program.digest[:12])
    try:
        while True:
            due_s = loop.round()
            nothing_soon = due_s > STAY_S and not loop.journals.unfinished()
            leaves = services.name == "systemd" and nothing_soon
            if not loop.wait(min(due_s, IDLE_S) if leaves else due_s) and leaves and api.leave():
                if not (orders.waiting() or orders.wake.is_set()):  # left by whoever was served just now
                    return  # its timer or a socket starts it again
                api.stay()
    finally:
        reporter.stop(REPORT_WITHIN_S)


def _system(
    kit: Kit,
    journals: Journals,
    orders: Orders,
    client: ServerClient,
    reporter: Reporter,
    around: Around | None,
) -> Callable[[], System]:
    """What makes line `os`, when somebody first wants something of it: a node without slots pays nothing."""

    @cache
    def made() -> System:
        from instar.updater.slots import open_platform, restart
        from instar.updater.system import System

        def opened() -> Platform:
            return open_platform(kit.settings.os, kit.layout, client.sound_program, around)

        tell, down = reporter.system_changed, lambda: restart(around)
        return System(kit, journals, orders, opened, client.wanted, tell, down)

    return made


def _drop_cut_pushes(layout: Layout) -> None:
    """What an updater that was ended meanwhile has left of a push. Only the role's holder pushes."""
    for path in layout.incoming.glob("*.push.new"):
        remove_tree(path)


def _handlers(program: Program, targets: Targets, orders: Orders) -> dict[str, Any]:
    about = {
        "version": program.version,
        "digest": program.digest,
        "release": program.release,
        "pid": os.getpid(),
    }

    def status(_: dict[str, Any]) -> dict[str, Any]:
        with orders.lock:
            return {**about, "transaction": orders.busy}

    def look(_: dict[str, Any]) -> dict[str, Any]:
        orders.wake.set()
        return {}

    def rollback(request: dict[str, Any]) -> dict[str, Any]:
        role = str(request.get("line", "agent"))
        release = previous_release(targets, role)
        tx = orders.order_rollback(role)
        return {"tx": tx, "line": role, "version": release.version, "digest": release.digest}

    return {"status": status, "health": status, "look": look, "rollback": rollback}


def _settings(layout: Layout) -> Settings:
    try:
        return read_config(layout)
    except InputError as error:
        log.error("%s; going on with the defaults", error.text)
        return Settings()


def _endpoint(layout: Layout, settings: Settings, program: Program) -> Endpoint:
    return Endpoint(
        read_node(layout).server,
        layout.ca,
        layout.certificate,
        layout.key,
        settings.network.proxy,
        program.header("updater"),
    )


def _become_launcher(layout: Layout, args: argparse.Namespace) -> None:
    """This process, with its pid and the options that it was launched with, goes on as whatever `current` names now.
    Does not return."""
    log.info("handing over to the release that is current")
    options = ["--log", args.log] if args.log != TEXT else []  # a launcher that was given some takes them
    words = command(layout.launcher, "launch", "updater", "--state", str(layout.state), *options)
    os.execv(words[0], words)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="instar updater", description="Replaces this node's releases.")
    parser.add_argument("--state", type=Path, required=True, help="the node's state folder")
    parser.add_argument("--rehearse", action="store_true", help="test yourself, and touch nothing")
    parser.add_argument("--tx", default="", help="the transaction that is rehearsed")
    parser.add_argument("--within", type=float, default=30.0, help="seconds for the rehearsal")
    parser.add_argument("--log", choices=(TEXT, "json"), default=TEXT)
    return parser.parse_args(argv)
