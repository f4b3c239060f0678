"""The wake-up port: a TCP connection from a trusted network makes the node phone home now (requirement R2).

A connection is accepted, shut down and closed; not one byte of it is ever read, so what a stranger sends
reaches the kernel and no code of ours. The work is bounded: so many connections in one turn of the event
loop, then a pause in which the rest waits in the kernel's queue, or is dropped there.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

from instar.core.networks import WakeSettings, is_in, network

BACKLOG = 128  # connections that wait in the kernel
UNREAD = 1024  # bytes that the kernel may keep of what one sends; it makes its own least of it
MOST_A_TURN = 32  # connections taken before others in the event loop have their turn
PAUSE_S = 0.005  # then for so long none is: at most 6,400 a second, a tenth of one core
STARVED_S = 1.0  # with no descriptor left, accept fails at once, each time
RETRY_S = 60.0  # until a port that another program has is tried again
PASSING = (
    errno.ECONNABORTED,
    errno.EINTR,
    errno.EPROTO,
    errno.ENETDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
)

log = logging.getLogger("instar.agent")


class Poke:
    """`woken` gets the peer's address: at most once in `every_s`, however many pokes came; one that came too
    early is not lost, it counts when the time has come. `now` is monotonic seconds.

    Raises InputError `bad-network` when a trusted network cannot be read (core/settings.py has checked).
    """

    def __init__(
        self,
        settings: WakeSettings,
        woken: Callable[[str], None],
        now: Callable[[], float],
        retry_s: float = RETRY_S,
    ) -> None:
        self._wanted, self._every_s, self._retry_s = settings.port, settings.every_s, retry_s
        self._trusted = [network(text) for text in settings.trusted]
        self._woken, self._now = woken, now
        self._listener: socket.socket | None = None
        self._last = -settings.every_s
        self._due: asyncio.TimerHandle | None = None  # a poke that came too early
        self._pause: asyncio.TimerHandle | None = None
        self._failed = ""

    @property
    def port(self) -> int:
        """The port that is listened on; 0: none."""
        return int(self._listener.getsockname()[1]) if self._listener is not None else 0

    def listen(self) -> bool:
        """Listen if the settings say so; idempotent. A port that cannot be had is said once, and is no error."""
        if self._listener is not None or not self._wanted:
            return self._listener is not None
        try:
            self._listener = _listener(self._wanted)
        except OSError as error:
            words = error.strerror or str(error)
            if words != self._failed:
                log.warning("cannot listen on the wake-up port %d: %s; trying again", self._wanted, words)
            self._failed = words
            return False
        self._failed = ""
        log.info("wake-up port %d is open", self.port)
        self._attend()
        return True

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while not self.listen():
                await asyncio.sleep(self._retry_s if self._wanted else 3600.0)
            await asyncio.Event().wait()
        finally:
            self._close()

    def _attend(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener.fileno(), self._turn, self._listener)

    def _turn(self, listener: socket.socket) -> None:
        """Take what has come, up to the bound."""
        for _ in range(MOST_A_TURN):
            try:
                connection, peer = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in PASSING:
                    continue
                self._rest(STARVED_S)
                return
            _part(connection)
            if is_in(str(peer[0]), self._trusted):
                self._poked(str(peer[0]))
        self._rest(PAUSE_S)

    def _rest(self, pause_s: float) -> None:
        loop = asyncio.get_running_loop()
        assert self._listener is not None
        loop.remove_reader(self._listener.fileno())
        self._pause = loop.call_later(pause_s, self._attend)

    def _poked(self, peer: str) -> None:
        if self._due is not None:
            return
        early_s = self._last + self._every_s - self._now()
        if early_s <= 0:
            self._wake(peer)
        else:
            self._due = asyncio.get_running_loop().call_later(early_s, self._wake, peer)

    def _wake(self, peer: str) -> None:
        self._due, self._last = None, self._now()
        log.info("poked by %s: phoning home", ascii(peer)[1:-1])
        self._woken(peer)

    def _close(self) -> None:
        for handle in (self._due, self._pause):
            if handle is not None:
                handle.cancel()
        self._due = self._pause = None
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None


def _part(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it has left already
    connection.close()


def _listener(port: int) -> socket.socket:
    """For IPv6 and IPv4 together; for IPv4 alone where the kernel has no IPv6."""
    try:
        return _bound(socket.AF_INET6, port)
    except OSError as error:
        if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            raise
    return _bound(socket.AF_INET, port)


def _bound(family: socket.AddressFamily, port: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNREAD)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.setblocking(False)
        listener.bind(("", port))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
