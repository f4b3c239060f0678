"""The launcher's beacon: a node on which no release of the agent runs calls its server for help.

It dials as the role `beacon`, takes a recovery core in blocks, and runs it when the server says
`agentupdate`, exactly as an agent does; the core then brings releases. This part is frozen: the launcher's
copy may be years older than the server (docs/protocol.md, 'The frozen part').

Import diet: bare standard library, `core`, `wire` and `host`. Nothing of this is loaded by a sound start.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from instar.core.backoff import Backoff
from instar.core.errors import InstarError, MachineError, ServerUnreachable
from instar.host import processes, rescue
from instar.host.clock import Clock
from instar.host.files import make_folder
from instar.host.identity import read_node
from instar.host.layout import Layout
from instar.host.line import Line
from instar.host.locks import RoleLock
from instar.host.points import reach
from instar.recovery.dialling import Refusal, Wire, dial, refusal, say
from instar.recovery.session import RECOVERY, Session
from instar.version import BUILT, VERSION
from instar.wire.messages import HELLO_WITHIN_S, PROTOCOL, Error, Hello, Message, Ping, Refused, Welcome

WAITS = (1.0, 2.0, 60.0)  # between two calls: floor, factor, cap, in seconds
STEADY_S = 10.0  # a connection that lasted this long ends a row of failures
MOST_AWAY_S = 600.0  # the longest that a server can send us away for
PING_BOUNDS_S = (0.2, 600.0)
PONG_WITHIN_S = 10.0
LOOK_S = 30.0  # how often the disk is looked at while connected
LOCK_S = 1.0
TICK_S = 0.2  # while a core runs


def serve(layout: Layout, clock: Clock, choose: Callable[[], str], for_s: float | None) -> str:
    """Call for help until there is a release to start; with `for_s`, for so long, though there is one.

    `choose` finds the release to start, and raises MachineError `no-release` while there is none. Returns
    its answer; raises what else it raises. A node that is not enrolled has nobody to call.
    """
    try:
        read_node(layout)
    except MachineError:
        if for_s is None:
            raise
        return choose()
    make_folder(layout.run, 0o700)
    with RoleLock(layout.role_lock("agent")) as lock:
        lock.acquire(LOCK_S)
        processes.record(layout.process("agent"), processes.this_process(clock.boot_id()))
        reach("beacon:recorded")
        end = time.monotonic() + for_s if for_s is not None else None
        beacon, backoff = Beacon(layout, clock, end), Backoff(*WAITS)
        while True:
            # What a core has brought is not for starting before the core says so.
            if end is None and not rescue.is_running(layout, clock):
                try:
                    return choose()
                except MachineError as error:
                    if error.code != "no-release":
                        raise
            began = time.monotonic()
            wait_s = beacon.call()
            if end is not None and (beacon.helped or time.monotonic() >= end):
                return choose()
            if beacon.helped:
                beacon.helped = False
                continue
            if time.monotonic() - began >= STEADY_S:
                backoff.reset()
            wait_s = max(wait_s, backoff.next(random.random()))
            time.sleep(wait_s if end is None else min(wait_s, max(0.0, end - time.monotonic())))


class Beacon:
    """`end` is when it is over, in monotonic seconds; None: when there is a release."""

    def __init__(self, layout: Layout, clock: Clock, end: float | None) -> None:
        self._layout, self._clock, self._end = layout, clock, end
        self._line = Line(layout.line("agent"))
        self._program = Path(sys.argv[0])
        self._digest = own_digest(self._program)
        self._started = clock.wall()
        self.helped = False  # a core has ended well: there is something new on the disk

    def call(self) -> float:
        """One connection, from dialling to its end; how long to stay away at least, in seconds."""
        try:
            wire = dial(self._layout, f"agent {VERSION} {self._digest}")
        except InstarError as error:
            return self._over(error)
        session = Session(self._layout, self._clock, wire)
        try:
            wire.send(self._hello())
            self._converse(session, wire, self._welcomed(wire))
            return 0.0
        except InstarError as error:
            return self._over(error)
        finally:
            session.close()
            wire.close()

    def _over(self, error: InstarError) -> float:
        say(f"{error.text} ({error.code})")
        return min(error.retry_after_s, MOST_AWAY_S) if isinstance(error, Refusal) else 0.0

    def _hello(self) -> Hello:
        machine = os.uname()
        return Hello(
            PROTOCOL, "beacon", read_node(self._layout).node, VERSION, self._digest, self._clock.boot_id(),
            os.getpid(), self._started, os="linux", arch=machine.machine,
            python=".".join(map(str, sys.version_info[:3])), features=[RECOVERY], built=BUILT,
        )  # fmt: skip

    def _welcomed(self, wire: Wire) -> tuple[Welcome, list[Message]]:
        """The welcome, and what came with it."""
        end = time.monotonic() + HELLO_WITHIN_S
        while (left := end - time.monotonic()) > 0:
            came = wire.receive(left)
            for number, message in enumerate(came):
                if isinstance(message, Welcome):
                    say(f"calling for help; the server is {ascii(message.server)[:40]}")
                    return message, came[number + 1 :]
                if isinstance(message, Refused):
                    raise refusal(message)
                if isinstance(message, Error):
                    say(f"the server could not use our hello: {ascii(message.message)[:300]}")
        raise ServerUnreachable("server-silent", f"no welcome within {HELLO_WITHIN_S:g} s")

    def _converse(self, session: Session, wire: Wire, began: tuple[Welcome, list[Message]]) -> None:
        welcome, came = began
        ping_s = min(max(welcome.ping_s, PING_BOUNDS_S[0]), PING_BOUNDS_S[1])
        now = heard = time.monotonic()
        next_ping, next_look, pings = now + ping_s, now + LOOK_S, 0
        while True:
            for message in came:
                session.heed(message)
            now = time.monotonic()
            heard = now if came else heard
            if session.follow():
                self.helped = True
                return
            if not session.busy and self._is_over(now, now >= next_look):
                return
            next_look = now + LOOK_S if now >= next_look else next_look
            if now >= next_ping:
                pings, next_ping = pings + 1, now + ping_s
                wire.send(Ping(pings))
            dead = heard + ping_s + PONG_WITHIN_S
            if now >= dead:
                raise ServerUnreachable("server-silent", f"nothing came for {now - heard:.0f} s")
            until = min(next_ping, dead, next_look, self._end or next_look)
            wait_s = max(0.001, until - now)
            came = wire.receive(min(wait_s, TICK_S) if session.busy else wait_s, session.descriptors())

    def _is_over(self, now: float, look: bool) -> bool:
        if self._end is not None:
            return now >= self._end
        if not look or rescue.is_running(self._layout, self._clock):
            return False
        return any(self._line.is_valid(name) for name in self._line.names())


def own_digest(program: Path) -> str:
    """The program digest of the launcher's copy: SHA-384 without the comment and its length (zip, EOCD)."""
    try:
        data = program.read_bytes()
    except OSError:
        data = b""
    end = data.rfind(b"PK\x05\x06")
    return hashlib.sha384(data[: end + 20] if end >= 0 else data).hexdigest()
