"""Accepts on the Unix socket and the TCP port; each connection is served in a thread of its own.

Whoever has not yet shown an operator's certificate is a stranger. Strangers have few places, in all and from
one address, and one that comes when they are taken has the place of the one that was there longest; so they
neither keep operators out, who may come from the same address, nor the updater from leaving. Operators have
places of their own, and so has the local socket. A port that another program has is said once, and tried again
every minute.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from instar.core.errors import MachineError
from instar.core.settings import host_port

MOST_CONNECTIONS = 16  # on the local socket; as many of operators, and as many of strangers
MOST_FROM_ONE = 4  # strangers
BACKLOG = 16
AGAIN_S = 0.2  # after an accept that failed, or that there was no place for
RETRY_S = 60.0  # until a port that another program has is tried again
SYSTEMD_FD = 3  # the first of sd_listen_fds(3)
MOST_HANDED_IN = 8

Local = Callable[[socket.socket], None]
Admit = Callable[
    [], None
]  # says that this is an operator; raises MachineError when there is no place for one
Remote = Callable[[socket.socket, str, Admit], None]  # the connection, and the address of its peer

log = logging.getLogger("instar.updater")


class _Guest:
    """One connection. `handle` is a second descriptor of it: TLS takes the first one away."""

    def __init__(self, kind: str, address: str, handle: socket.socket | None) -> None:
        self.kind, self.address, self.handle = kind, address, handle

    def turn_out(self) -> None:
        """Whoever serves it finds it at its end."""
        if self.handle is not None:
            with contextlib.suppress(OSError):
                self.handle.shutdown(socket.SHUT_RDWR)


class Listener:
    """`local` and `remote` serve one connection each, to its end; it is closed for them afterwards.

    `api` is the setting `updater.api`. Sockets that systemd hands in are used in place of our own; one for TCP
    of a node whose `api` is '' is answered by closing, for systemd listens on it anyhow.
    """

    def __init__(self, path: Path, api: str, local: Local, remote: Remote, retry_s: float = RETRY_S) -> None:
        self._local, self._remote, self._retry_s = local, remote, retry_s
        self._lock = threading.Lock()
        self._served: set[_Guest] = set()  # of the local socket, and operators
        self._strangers: list[_Guest] = []  # in the order in which they came
        self._leaving = False
        self._failed = ""
        self._due = 0.0
        self._selector = selectors.DefaultSelector()
        handed = handed_in()
        local_socket = next((s for s in handed if s.family == socket.AF_UNIX), None) or _bound(path)
        over_tcp = [s for s in handed if s.family in (socket.AF_INET, socket.AF_INET6)]
        self._add(local_socket, "local")
        for each in over_tcp:
            self._add(each, "tcp" if api else "closed")
        self._address = host_port(api) if api and not over_tcp else None
        if over_tcp and api and not any(_is_at(each, host_port(api)) for each in over_tcp):
            log.warning("systemd says where the API listens; updater.api %s has no effect but 'on'", api)
        self._thread = threading.Thread(target=self._run, name="api", daemon=True)

    def start(self) -> None:
        self._bind_if_due()
        self._thread.start()

    def leave(self) -> bool:
        """Whether nobody is being served, so that this process may end; nobody new is accepted from then on.
        Strangers are not served.

        Under systemd, whoever comes then waits for the next updater.
        """
        with self._lock:
            self._leaving = not self._served
            return self._leaving

    def stay(self) -> None:
        """Take `leave` back."""
        with self._lock:
            self._leaving = False

    def _add(self, listener: socket.socket, kind: str) -> None:
        listener.setblocking(False)  # a client that is gone again must not make accept wait
        self._selector.register(listener, selectors.EVENT_READ, kind)

    def _run(self) -> None:
        while True:
            wait_s = self._bind_if_due()
            for key, _ in self._selector.select(wait_s):
                assert isinstance(key.fileobj, socket.socket)
                try:
                    fine = self._accept(key.fileobj, key.data)
                except BlockingIOError:
                    continue
                except (OSError, RuntimeError):  # out of descriptors or threads: later may be luckier
                    fine = False
                if not fine:
                    time.sleep(AGAIN_S)

    def _accept(self, listener: socket.socket, kind: str) -> bool:
        """Take one connection; False when there is no place for one of our own machine, which then waits."""
        with self._lock:
            if self._leaving or (kind == "local" and self._count("local") >= MOST_CONNECTIONS):
                return False
            connection, peer = listener.accept()
            if kind == "closed":
                connection.close()
                return True
            try:
                guest = _Guest(kind, "", None)
                if kind != "local":
                    guest = _Guest(kind, str(peer[0]), connection.dup())
            except OSError:
                connection.close()
                raise
            if kind == "local":
                self._served.add(guest)
            else:
                self._make_room(guest.address)
                self._strangers.append(guest)
        thread = threading.Thread(
            target=self._serve, args=(connection, guest), name=f"api-{kind}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            self._ended(connection, guest)
            raise
        return True

    def _count(self, kind: str) -> int:
        return sum(guest.kind == kind for guest in self._served)

    def _make_room(self, address: str) -> None:
        """Turn out the stranger who has been there longest, of those from `address` or of all."""
        from_there = [guest for guest in self._strangers if guest.address == address]
        if len(from_there) >= MOST_FROM_ONE:
            oldest = from_there[0]
        elif len(self._strangers) >= MOST_CONNECTIONS:
            oldest = self._strangers[0]
        else:
            return
        self._strangers.remove(oldest)
        oldest.turn_out()

    def _admit(self, guest: _Guest) -> None:
        """No stranger any more. Raises MachineError `no-place`."""
        with self._lock:
            if guest not in self._strangers:  # turned out, or said twice
                return
            if self._leaving or self._count("tcp") >= MOST_CONNECTIONS:
                got = "an updater that is leaving" if self._leaving else "one more"
                text = f"cannot serve: expected at most {MOST_CONNECTIONS} operators at a time, got {got}"
                raise MachineError("no-place", text)
            self._strangers.remove(guest)
            self._served.add(guest)

    def _serve(self, connection: socket.socket, guest: _Guest) -> None:
        try:
            if guest.kind == "local":
                self._local(connection)
            else:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._remote(connection, guest.address, lambda: self._admit(guest))
        except OSError as error:
            log.debug("a connection of %s ended: %s", guest.address or "this machine", error)
        finally:
            self._ended(connection, guest)

    def _ended(self, connection: socket.socket, guest: _Guest) -> None:
        with contextlib.suppress(OSError):
            connection.close()
        with self._lock:
            self._served.discard(guest)
            if guest in self._strangers:
                self._strangers.remove(guest)
            if guest.handle is not None:
                guest.handle.close()  # under the lock: nobody may be turning it out

    def _bind_if_due(self) -> float | None:
        """Listen on the TCP port unless that is done; seconds until it is to be tried again, None for never."""
        if self._address is None:
            return None
        if (left := self._due - time.monotonic()) > 0:
            return left
        host, port = self._address
        try:
            listener = _bound_tcp(host, port)
        except OSError as error:
            words = error.strerror or str(error)
            if words != self._failed:
                log.warning("the API cannot listen on %s port %d: %s; trying again", host, port, words)
            self._failed, self._due = words, time.monotonic() + self._retry_s
            return self._retry_s
        self._add(listener, "tcp")
        self._address = None
        log.info("the API listens on %s port %d", host, port)
        return None


def handed_in() -> list[socket.socket]:
    """The listening sockets that systemd handed to this very process, in their order."""
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return []
    found = []
    for fd in range(SYSTEMD_FD, SYSTEMD_FD + min(int(count), MOST_HANDED_IN)):
        with contextlib.suppress(OSError):
            found.append(socket.socket(fileno=fd))
    return [each for each in found if each.type == socket.SOCK_STREAM]


def _is_at(listener: socket.socket, address: tuple[str, int]) -> bool:
    return bool(listener.getsockname()[:2] == address)


def _bound(path: Path) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(old)
    listener.listen(BACKLOG)
    return listener


def _bound_tcp(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # the updater before us has just left it
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
