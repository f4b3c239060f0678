"""The resident's control channel: connect, say hello, stay alive, come back. It never gives up.

One task owns the connection. Reconnects wait by a backoff with floor, jitter and cap, never less than
what the server asked for. A peer from which nothing came for ping_s + PONG_WITHIN_S is dead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from instar.agent.link import Link, Refusal, Unusable
from instar.core.backoff import Backoff
from instar.core.errors import InputError, InstarError, MachineError, ServerUnreachable
from instar.wire.messages import (
    HELLO_WITHIN_S,
    Ack,
    AgentUpdate,
    Cancel,
    Command,
    Error,
    Health,
    Hello,
    Job,
    Look,
    Message,
    Ping,
    Pong,
    Refused,
    UpdateBlock,
    UpdateEnd,
    UpdateOffer,
    Welcome,
)

Order = Job | Cancel | Command | AgentUpdate | UpdateOffer | UpdateBlock | UpdateEnd

WELCOME_WITHIN_S = HELLO_WITHIN_S
PONG_WITHIN_S = 10.0
PING_BOUNDS_S = (0.2, 600.0)  # whatever a server asks for
HEALTH_BOUNDS_S = (1.0, 86_400.0)
MOST_AWAY_S = 3600.0  # the longest that a server can send us away for
STEADY_S = 10.0  # a connection that lasted this long ends a row of failures

log = logging.getLogger("instar.agent")


class Duties(Protocol):
    """What the channel's messages ask of the rest of the agent. None of it may block."""

    def hello(self) -> Hello: ...
    def health(self) -> Health: ...
    def welcomed(self) -> None: ...
    def look(self, reason: str) -> None: ...
    def job(self, job: Job) -> None: ...  # this and the next four may raise InputError, which the server gets
    def cancel(self, job_id: str) -> None: ...
    def command(self, command: Command) -> None: ...
    def update(self, message: UpdateOffer | UpdateBlock | UpdateEnd) -> None: ...
    def recover(self, order: AgentUpdate, pin: str) -> None: ...  # `pin` as Link.pin
    def acknowledged(self, item_id: str) -> None: ...  # a job's result, or a command's end


class Channel:
    """`open_link` makes a connection; `random01` draws from [0, 1]; `now` is monotonic seconds."""

    def __init__(
        self,
        open_link: Callable[[], Awaitable[Link]],
        duties: Duties,
        backoff: Backoff,
        random01: Callable[[], float],
        now: Callable[[], float],
        pong_within_s: float = PONG_WITHIN_S,
    ) -> None:
        self._open_link, self._duties, self._backoff = open_link, duties, backoff
        self._random01, self._now, self._pong_within_s = random01, now, pong_within_s
        self._link: Link | None = None
        self._since: float | None = None
        self._hurry = asyncio.Event()
        self._pings, self._heard = 0, 0.0
        self.refused: Callable[[str], None] = lambda _code: None  # told the code of each refusal

    @property
    def connected_for_s(self) -> float | None:
        """Seconds since the server's welcome; None while not connected."""
        return None if self._since is None else self._now() - self._since

    def send(self, message: Message) -> bool:
        """Send now if there is a welcome connection. Raises InputError when no frame can hold it."""
        if self._link is None or self._since is None:
            return False
        self._link.send(message)
        return True

    def hurry(self) -> None:
        """Cut the present wait before a reconnect short (somebody on this machine asked)."""
        self._hurry.set()

    def poke(self) -> bool:
        """Ping at once; whether there is a connection. One that stays silent is given up for a new one:
        this machine, or its network, may have been away and the other end know nothing of us any more."""
        if self._link is None or not self.send(self._next_ping()):
            return False
        asyncio.get_running_loop().call_later(self._pong_within_s, self._doubt, self._link, self._now())
        return True

    def _doubt(self, link: Link, asked: float) -> None:
        if self._link is link and self._heard < asked:
            log.warning("nothing came from the server since we were poked; connecting anew")
            link.cut()

    async def run(self) -> None:
        """Until cancelled; then it says goodbye to the server first."""
        while True:
            refusal_s = 0.0
            began = self._now()
            try:
                await self._connection()
            except Refusal as refusal:
                refusal_s = min(refusal.retry_after_s, MOST_AWAY_S)
                log.warning("refused by the server: %s (%s)", refusal.text, refusal.code)
                self.refused(refusal.code)
            except InstarError as error:
                log.warning("%s (%s)", error.text, error.code)
            if self._now() - began >= STEADY_S:
                self._backoff.reset()
            await self._wait(refusal_s)

    async def _wait(self, refusal_s: float) -> None:
        """Spread over twice the floor at least, so that a fleet does not come back in one instant."""
        own_s = self._backoff.next(self._random01()) * (1 + self._random01())
        wait_s = max(own_s, refusal_s * (1 + 0.1 * self._random01()))
        log.info("next try in %.1f s", wait_s)
        self._hurry.clear()
        if refusal_s >= wait_s / 2:  # the server's word stands, whoever hurries
            await asyncio.sleep(wait_s)
            return
        try:
            async with asyncio.timeout(wait_s):
                await self._hurry.wait()
        except TimeoutError:
            pass

    async def _connection(self) -> None:
        """One connection, from dialling to its end. Raises InstarError when it ends."""
        link = await self._open_link()
        self._link = link
        try:
            link.send(self._duties.hello())
            welcome, rest = await self._welcome(link)
            self._since = self._now()
            log.info("connected; the server is %s", ascii(welcome.server)[:40])
            self._duties.welcomed()
            await self._converse(link, welcome, rest)
        finally:
            self._link = self._since = None
            await link.close()

    async def _welcome(self, link: Link) -> tuple[Welcome, list[Message | Unusable]]:
        """The welcome, and what came with it."""
        end = self._now() + WELCOME_WITHIN_S
        while (left := end - self._now()) > 0:
            came = await link.receive(left)
            for number, message in enumerate(came):
                if isinstance(message, Welcome):
                    return message, came[number + 1 :]
                if isinstance(message, Refused):
                    raise _refusal(message)
                if isinstance(message, Error):
                    log.warning("the server could not use our hello: %s", ascii(message.message)[:300])
        text = f"cannot connect: expected a welcome within {WELCOME_WITHIN_S:g} s, got none"
        raise ServerUnreachable("server-silent", text)

    async def _converse(self, link: Link, welcome: Welcome, came: list[Message | Unusable]) -> None:
        ping_s = _within(welcome.ping_s, PING_BOUNDS_S)
        health_s = _within(welcome.health_s, HEALTH_BOUNDS_S)
        self._heard = now = self._now()
        next_ping, next_health, self._pings = now + ping_s, now, 0
        while True:
            for message in came:
                self._heed(link, message)
            now = self._now()
            self._heard = now if came else self._heard
            if now >= next_health:
                link.send(self._duties.health())
                next_health = now + health_s
            if now >= next_ping:
                link.send(self._next_ping())
                next_ping = now + ping_s
            dead = self._heard + ping_s + self._pong_within_s
            if now >= dead:
                text = f"cannot go on: nothing came from the server for {now - self._heard:.0f} s"
                raise ServerUnreachable("server-silent", text)
            came = await link.receive(max(0.001, min(next_ping, next_health, dead) - now))

    def _next_ping(self) -> Ping:
        self._pings += 1
        return Ping(self._pings)

    def _take(self, link: Link, order: Order) -> None:
        """What the server wants done. One that this node cannot take is answered, and costs nothing else."""
        try:
            if isinstance(order, Job):
                self._duties.job(order)
            elif isinstance(order, Cancel):
                self._duties.cancel(order.id)
            elif isinstance(order, Command):
                self._duties.command(order)
            elif isinstance(order, AgentUpdate):
                self._duties.recover(order, link.pin())
            else:
                self._duties.update(order)
        except InputError as error:
            log.warning("a %s from the server: %s", order.T, error.text)
            link.send(Error(error.code, error.text))
        except MachineError as error:  # nothing was kept of it, and nothing was said to have been taken
            log.error("a %s from the server: %s (%s)", order.T, error.text, error.code)

    def _heed(self, link: Link, message: Message | Unusable) -> None:
        """Obey one message. What cannot be obeyed is answered with an `error`; the connection stays."""
        if isinstance(message, Unusable):
            log.warning("a frame from the server: %s (%s)", message.problem.text, message.problem.code)
        elif isinstance(message, Order):
            self._take(link, message)
        elif isinstance(message, Ack):
            try:
                self._duties.acknowledged(message.id)
            except MachineError as error:  # then its result is sent again after the next start
                log.error("an ack from the server: %s", error.text)
        elif isinstance(message, Look):
            self._duties.look(message.reason)
        elif isinstance(message, Ping):
            link.send(Pong(message.n))
        elif isinstance(message, Refused):
            raise _refusal(message)
        elif isinstance(message, Error):
            log.warning("the server could not use a frame: %s", ascii(message.message)[:300])
        elif not isinstance(message, (Pong, Welcome)):
            text = f"cannot read frame: expected a message for nodes, got '{message.T}'"
            link.send(Error("unexpected-type", text))


def _refusal(message: Refused) -> Refusal:
    return Refusal(message.code[:64], ascii(message.message)[1:-1][:300], max(message.retry_after_s, 0.0))


def _within(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
