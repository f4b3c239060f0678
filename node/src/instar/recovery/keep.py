"""The keeper: a service manager of few lines, for nodes that are started by hand.

It starts the launcher for each role, and again whenever the role's process ends: at once the first
time, then with growing waits while it does not stay up; HUP ends such a wait. A keeper that was killed
leaves the daemons running; the next one adopts them by their records. TERM ends the daemons, then it.

Import diet: bare standard library, `core` and `host`.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import sys
from pathlib import Path

from instar.core.backoff import Backoff
from instar.core.errors import InputError, InstarError, MachineError
from instar.host import processes
from instar.host.clock import Clock
from instar.host.layout import LINES, Layout
from instar.host.locks import RoleLock
from instar.host.points import reach
from instar.host.services import GRACE_S, ByHand, RoleLockProbe
from instar.recovery import guard, launch

STEADY_S = 20.0  # a process that ran this long is started again at once
LOCK_WITHIN_S = 1.0
TICK_S = 5.0  # how often trials are looked at
HELD_S = 1.0  # how often a role is looked at that somebody else plays
NOT_RUNNING = 3  # exit status of an init script's `status`, by the Linux Standard Base
USAGE = "usage: instar keep --state DIR [--by MANAGER] [--detach | --end | --check]"
LOG_BYTES = 4 * 1024 * 1024
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class Kept:
    """One role: its process, and when to start the next."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.backoff = Backoff(0.2, 2.0, 10.0)
        self.process: processes.Process | None = None
        self.pidfd: int | None = None
        self.started_at = 0.0
        self.due = 0.0
        self.quick_ends = 0
        self.nudged = False  # somebody ended it on purpose: no wait
        self.waits = False  # for somebody else who plays the role

    def ended(self, now: float) -> None:
        if self.pidfd is not None:
            os.close(self.pidfd)
        self.pidfd = self.process = None
        if now - self.started_at >= STEADY_S:
            self.backoff.reset()
            self.quick_ends = 0
        self.quick_ends += 1
        self.due = now if self.quick_ends <= 1 else now + self.backoff.next(random.random())


class Keeper:
    def __init__(self, layout: Layout, clock: Clock) -> None:
        self.layout, self.clock = layout, clock
        self.roles = [Kept(role) for role in LINES]
        self.stopping = False
        self._reader = -1

    def listen(self) -> None:
        """Take signals. To be called before anybody can know of this process: an early HUP would end it."""
        self._reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGHUP, self._nudged)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> None:
        """Keep until TERM or INT."""
        next_tick = self.clock.monotonic() + TICK_S
        while not self.stopping:
            self._reap()
            now = self.clock.monotonic()
            for kept in self.roles:
                self._look_after(kept, now)
            if now >= next_tick:
                self._check_trials()
                next_tick = now + TICK_S
            self._wait(next_tick)
        self._end_all()

    def _stop(self, *_: object) -> None:
        self.stopping = True

    def _nudged(self, *_: object) -> None:
        for kept in self.roles:
            kept.nudged = True

    def _look_after(self, kept: Kept, now: float) -> None:
        if kept.pidfd is not None and processes.wait_gone(kept.pidfd, 0):
            kept.ended(now)
        if kept.pidfd is None and (kept.nudged or now >= kept.due):
            kept.nudged = False
            if not self._adopt(kept) and not self._is_anothers(kept, now):
                self._spawn(kept, now)

    def _adopt(self, kept: Kept) -> bool:
        process = processes.recorded(self.layout.process(kept.role))
        kept.pidfd = processes.open_pidfd(process, self.clock.boot_id()) if process else None
        kept.process = process if kept.pidfd is not None else None
        return kept.pidfd is not None

    def _is_anothers(self, kept: Kept, now: float) -> bool:
        """Whether somebody else plays the role, as a recovery core does the updater's: a launcher could only say
        so and leave."""
        held = False
        try:
            with RoleLock(self.layout.role_lock(kept.role)) as lock:
                lock.acquire(launch.FORK_S)
        except MachineError:
            held = True
        except OSError:
            pass  # the launcher says what is wrong
        if held and not kept.waits:
            print(f"instar keep: another process is this node's {kept.role}", file=sys.stderr, flush=True)
        kept.waits = held
        if held:
            kept.due = now + HELD_S
        return held

    def _spawn(self, kept: Kept, now: float) -> None:
        # A signal between fork and the child's own handlers must not be lost in the child.
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        pid = os.fork()
        if pid == 0:
            _become_daemon(self.layout, kept.role)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
        kept.pidfd = os.pidfd_open(pid)
        kept.started_at = now
        reach(f"keep:{kept.role}:spawned")

    def _reap(self) -> None:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return

    def _check_trials(self) -> None:
        for kept in self.roles:
            if self.layout.line(kept.role).trial.exists():
                try:
                    guard.guard(self.layout, kept.role, self.clock, ByHand(self.layout, self.clock))
                except (InstarError, OSError) as error:
                    print(f"instar keep: cannot guard {kept.role}: {error}", file=sys.stderr, flush=True)

    def _wait(self, next_tick: float) -> None:
        now = self.clock.monotonic()
        dues = [kept.due for kept in self.roles if kept.pidfd is None]
        if any(kept.nudged and kept.pidfd is None for kept in self.roles):
            return
        until = min([next_tick, *dues])
        poller = select.poll()
        poller.register(self._reader, select.POLLIN)
        for kept in self.roles:
            if kept.pidfd is not None:
                poller.register(kept.pidfd, select.POLLIN)
        if any(fd == self._reader for fd, _ in poller.poll(max(1, round((until - now) * 1000)))):
            os.read(self._reader, 4096)

    def _end_all(self) -> None:
        for kept in self.roles:
            if kept.pidfd is not None:  # also one that has not written its record yet
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(kept.pidfd, signal.SIGTERM)
            process = processes.recorded(self.layout.process(kept.role))
            if process is not None:
                processes.stop(process, self.clock.boot_id(), GRACE_S)


def _become_daemon(layout: Layout, role: str) -> None:
    """In the forked child: an own session and log, no descriptor of the keeper's, then the launcher."""
    status = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in HANDLED:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
        log = _open_log(layout.run / f"{role}.log")
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.closerange(3, 1024)
        status = launch.main([role, "--state", str(layout.state)])
    finally:
        os._exit(status)


def _open_log(path: Path) -> int:
    """The daemon's log; a long one is put aside first, so that two of them are all there ever is."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_BYTES:
            os.replace(path, path.with_suffix(".log.1"))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


class Options:
    """What the command line says. `by` names who started this keeper: it is read from outside (host/services)."""

    state = ""
    by = ""
    do = ""


def main(argv: list[str]) -> int:
    """`keep --state DIR [--by MANAGER]`: one keeper per state folder; a second one says so and leaves.

    For init scripts: `--detach` starts one in the background, `--end` ends it and all it keeps, `--check`
    ends with 0 while one runs, else with 3.
    """
    try:
        options = _parse(argv)
        layout, clock = Layout(Path(options.state)), Clock()
        if options.do == "--detach":
            return _detach(layout, clock, options.by)
        if options.do == "--end":
            ByHand(layout, clock).stop("agent")
            return 0
        if options.do == "--check":
            runs = RoleLockProbe(layout.role_lock("keep")).held()
            print(f"instar is {'running' if runs else 'not running'}")
            return 0 if runs else NOT_RUNNING
        return _keep(layout, clock)
    except (InstarError, OSError) as error:
        print(f"instar keep: {error}", file=sys.stderr, flush=True)
        return getattr(error, "exit_status", 4)


def _parse(argv: list[str]) -> Options:
    options, words = Options(), list(argv)
    try:
        while words:
            word = words.pop(0)
            if word in ("--state", "--by"):
                setattr(options, word[2:], words.pop(0))
            elif word in ("--detach", "--end", "--check"):
                options.do = word
            else:
                raise ValueError(word)
        if not options.state:
            raise ValueError("--state")
    except (ValueError, IndexError):
        raise InputError("usage", USAGE) from None
    return options


def _detach(layout: Layout, clock: Clock, by: str) -> int:
    ByHand(layout, clock, by).start("agent")
    if not RoleLockProbe(layout.role_lock("keep")).held():
        text = f"cannot start the keeper; its words are in {layout.run / 'keeper.log'}"
        raise MachineError("no-keeper", text)
    return 0


def _keep(layout: Layout, clock: Clock) -> int:
    lock = RoleLock(layout.role_lock("keep"))
    try:
        lock.acquire(LOCK_WITHIN_S)  # who only asks whether it is held has it for a moment, too
    except MachineError:
        print("instar keep: another keeper runs for this state folder", file=sys.stderr)
        return 4
    keeper = Keeper(layout, clock)
    keeper.listen()
    with lock:
        processes.record(layout.process("keep"), processes.this_process(clock.boot_id()))
        os.chdir("/")
        keeper.run()  # its record stays: a later keeper may have to write over it on a full disk
    return 0
