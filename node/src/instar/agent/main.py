"""`agent --state DIR`, and `agent --rehearse --state DIR --tx TX [--within SECONDS]`. Only wires.

Exit: 0 stopped by a signal, or the rehearsal passed; otherwise the status of the error's class.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from instar.agent.channel import Channel
from instar.agent.dial import Dialer
from instar.agent.jobs import Jobs
from instar.agent.late import Late
from instar.agent.link import Link, open_link
from instar.agent.local_api import LocalApi
from instar.agent.node import Node, load_node
from instar.agent.poke import Poke
from instar.agent.rehearse import rehearse
from instar.agent.renew import Renewer
from instar.agent.resident import Resident, first_to_end, make_hello
from instar.agent.runners import Runners
from instar.agent.shelf import Shelf
from instar.agent.store import DiskStore
from instar.agent.wake import Waker
from instar.agent.watch import watch_updater
from instar.core.backoff import Backoff
from instar.core.errors import InputError, InstarError, MachineError
from instar.host import logs, processes
from instar.host.clock import Clock
from instar.host.files import make_folder
from instar.host.interpreter import command
from instar.host.layout import Layout
from instar.host.locks import RoleLock
from instar.host.points import reach
from instar.host.program import Program, running_program

if TYPE_CHECKING:
    from instar.agent.check import Checks
    from instar.agent.commands import Commands
    from instar.agent.native import Native
    from instar.agent.recovery import Recovery
    from instar.agent.supervisor import Supervisor

USAGE = (
    "usage: instar agent --state DIR [--log text|json] [--lock-within SECONDS], "
    "or instar agent --rehearse --state DIR --tx TX [--within SECONDS]"
)
LOCK_WITHIN_S = 10.0  # an old agent that is being stopped needs a moment
END_WITHIN_S = 6.0  # for a part to end once it is cancelled
JOB_GRACE_S = 2.0  # for a running job, when we are told to stop
MODULE_GRACE_S = 4.0  # for the modules; together less than what a service manager waits for us
RECONNECT = (0.5, 2.0, 30.0)  # floor, factor, cap, in seconds
RENEW_RETRY = (60.0, 2.0, 3600.0)

log = logging.getLogger("instar.agent")


def main(argv: list[str]) -> int:
    try:
        args = parse(argv)
        logs.set_up(args.log, "WARNING" if args.rehearse else "INFO")
        layout = Layout(args.state)
        program = running_program(sys.argv[0])
        if args.rehearse:
            asyncio.run(_rehearse(layout, program, args.tx, args.within))
            return 0
        load_node(layout)  # before anything is made: a wrong --state changes nothing
        make_folder(layout.run, 0o700)
        with RoleLock(layout.role_lock("agent")) as lock:
            lock.acquire(args.lock_within)
            reach("agent:locked")
            again = asyncio.run(_reside(layout, program))
        if again:
            _become_launcher(layout, program, args)
        _leave()
    except InstarError as error:
        print(f"{error.text} ({error.code})", file=sys.stderr, flush=True)
        return error.exit_status
    except OSError as error:
        print(f"cannot run the agent: {error}", file=sys.stderr, flush=True)
        return MachineError.exit_status
    return 0


async def _rehearse(layout: Layout, program: Program, tx: str, within_s: float) -> None:
    node = load_node(layout)
    hello = make_hello(program, node, Clock(), "rehearsal", tx)
    await rehearse(Dialer(layout, node.server, node.proxy), program, hello, within_s)


async def _reside(layout: Layout, program: Program) -> bool:
    """Run until SIGTERM or SIGINT, or until the agent must start again by itself: whether that is so.

    Raises InstarError, or whatever ended a part by fault.
    """
    clock, node = Clock(), load_node(layout)
    _record(layout, program, clock)
    if node.wasmtime:
        os.environ["INSTAR_WASMTIME"] = node.wasmtime  # for the runners
    dialer = Dialer(layout, node.server, node.proxy)
    waker = Waker(layout.socket("updater"))
    renew = program.command("renew", "--state", str(layout.state))
    renewer = Renewer(layout.certificate, renew, Backoff(*RENEW_RETRY), random01, clock.wall)
    agent = Resident(layout, program, node, clock, waker, renewer)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, agent.stop.set)

    async def connect() -> Link:
        await renewer.before_channel()
        return await open_link(dialer, program.header("agent"))

    agent.channel = channel = Channel(connect, agent, Backoff(*RECONNECT), random01, clock.monotonic)
    channel.refused = renewer.refused
    agent.poke = Poke(node.wake, agent.poked, clock.monotonic)
    runners = _wire_modules(layout, program, clock, agent)
    _wire_updates(layout, program, node, clock, agent)
    jobs = agent.jobs
    api = LocalApi(layout.socket("agent"), agent.handlers())
    await api.open()
    reach("agent:ready")
    log.info("agent %s of %s runs as %s", program.version, program.digest[:12], node.id)
    guard = command(layout.launcher, "guard", "updater", "--state", str(layout.state))
    commands = asyncio.create_task(agent.commands.run(), name="commands")
    tasks = [
        asyncio.create_task(channel.run(), name="channel"),
        asyncio.create_task(agent.modules.run(), name="modules"),
        asyncio.create_task(jobs.run(), name="jobs"),
        asyncio.create_task(waker.run(), name="waker"),
        asyncio.create_task(renewer.run(), name="renewer"),
        asyncio.create_task(agent.poke.run(), name="poke"),
        asyncio.create_task(agent.native.run(), name="native"),
        asyncio.create_task(agent.recovery.run(), name="recovery"),
        asyncio.create_task(watch_updater(layout.line("updater").trial, guard), name="watch"),
        commands,
    ]
    try:
        await first_to_end(tasks, agent.stop)
        log.info("stopping")
        await _end(commands)  # a restart that is under way goes no further
        await asyncio.gather(jobs.finish(JOB_GRACE_S), _stop_modules(agent))
    finally:
        api.close()
        for task in reversed(tasks):  # the channel last: it can still carry what the others leave
            await _end(task)
        await runners.close()
    return agent.again


def _wire_modules(layout: Layout, program: Program, clock: Clock, agent: Resident) -> Runners:
    """Jobs, modules and commands; the last two are carried only once there is something of them."""
    runners = Runners(program.command("runner"))
    shelf = Shelf(layout, program.command("fetch-module", "--state", str(layout.state)))
    agent.jobs = Jobs(
        DiskStore(layout.jobs, clock.wall, boot_id=clock.boot_id()),
        runners,
        shelf,
        lambda: agent.modules.made,
        agent.channel.send,
        layout.run / "scratch",
        clock,
        random01,
    )

    def supervisor() -> Supervisor:
        from instar.agent.supervisor import Supervisor

        return Supervisor(layout, shelf, runners, clock, random01, agent.modules_changed)

    def commands() -> Commands:
        from instar.agent.command_store import CommandStore
        from instar.agent.commands import Commands

        return Commands(CommandStore(layout.commands), agent.modules.need(), agent, clock)

    @cache
    def checks() -> Checks:
        from instar.agent.check import Checks

        return Checks(layout, shelf, runners)

    agent.modules, agent.commands, agent.checks = Late(supervisor), Late(commands), checks
    if _has_modules(layout):
        agent.modules.need()
    if _has_commands(layout):
        agent.commands.need()
    return runners


def _wire_updates(layout: Layout, program: Program, node: Node, clock: Clock, agent: Resident) -> None:
    """Updates that come through the channel; carried only once there is one."""

    def native() -> Native:
        from instar.agent.native import Native

        return Native(layout, program.digest, agent.channel.send, agent.received, clock.monotonic)

    def recovery() -> Recovery:
        from instar.agent.recovery import Recovery

        server, send = f"https://{node.server}", agent.channel.send
        return Recovery(layout, program, server, clock, send, over=agent.recovered)

    agent.native, agent.recovery = Late(native), Late(recovery)


def _has_modules(layout: Layout) -> bool:
    """Whether there is a service module, or a process that one left behind."""
    try:
        places = [layout.module(name) for name in os.listdir(layout.modules)]
    except OSError:
        return False
    return any(place.current.is_symlink() or place.process.exists() for place in places)


def _has_commands(layout: Layout) -> bool:
    """Whether there is one that has not ended, or whose end the server does not know."""
    try:
        return any(name.endswith(".json") for name in os.listdir(layout.commands))
    except OSError:
        return False


async def _stop_modules(agent: Resident) -> None:
    if agent.modules.made is not None:
        await agent.modules.made.stop_all(MODULE_GRACE_S, "whoever stopped the agent")


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task], timeout=END_WITHIN_S)


def _become_launcher(layout: Layout, program: Program, args: Options) -> None:
    from instar.agent.again import become_launcher

    become_launcher(layout, program, ["--log", args.log, "--lock-within", str(args.lock_within)])


def _leave() -> None:
    """End this process, at once: the kernel tidies up in no time, the interpreter takes 10 ms of an
    update's gap for it. Nothing waits to be written: the log is not buffered, and no thread works for us.
    """
    sys.stderr.flush()
    os._exit(0)


def _record(layout: Layout, program: Program, clock: Clock) -> None:
    """Say which process is the agent. The launcher has done so already when it started us."""
    mine = processes.this_process(clock.boot_id(), program.release)
    if processes.recorded(layout.process("agent")) != mine:
        processes.record(layout.process("agent"), mine)


def random01() -> float:
    """A number from [0, 1). The random module would cost the resident 250 KiB."""
    return int.from_bytes(os.urandom(6), "big") / 2**48


class Options:
    """What the command line says; these are the defaults."""

    state: Path = Path()
    rehearse: bool = False
    tx: str = ""
    within: float = 30.0
    lock_within: float = LOCK_WITHIN_S
    log: str = "text"


def parse(argv: list[str]) -> Options:
    """Raises InputError `usage`. Done by hand: argparse would cost the resident 300 KiB."""
    options, words = Options(), list(argv)
    try:
        while words:
            word = words.pop(0)
            if word == "--rehearse":
                options.rehearse = True
            elif word == "--state":
                options.state = Path(words.pop(0)).absolute()
            elif word == "--tx":
                options.tx = words.pop(0)
            elif word == "--log" and words[0] in ("text", "json"):
                options.log = words.pop(0)
            elif word in ("--within", "--lock-within"):
                setattr(options, word[2:].replace("-", "_"), float(words.pop(0)))
            else:
                raise ValueError(word)
        if options.state == Path() or (options.rehearse and not options.tx):
            raise ValueError("--state" if options.tx or not options.rehearse else "--tx")
    except (ValueError, IndexError):
        raise InputError("usage", USAGE) from None
    return options
