"""The beacon's connection: TCP, the proxy's CONNECT where there is one, mutual TLS, WebSocket. Blocking.

Every wait is bounded, but for the resolver's own. Bare standard library, `core`, `wire` and `host`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import select
import socket
import ssl
import sys
import time
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from instar.core.errors import InputError, InstarError, ServerRefused, ServerUnreachable
from instar.host.identity import read_node
from instar.host.layout import Layout
from instar.host.tls import client_context
from instar.wire.codec import decode, encode
from instar.wire.messages import MAX_FRAME, Error, Message, Refused
from instar.wire.websocket import ClientSocket, Closed, Event, Opened, Rejected, Text, TooLarge

PATH = "/v1/channel"
CONNECT_S = 15.0  # for each of TCP, CONNECT, TLS
UPGRADE_S = 10.0
SEND_S = 10.0
READ = 65_536
PROXY_ANSWER = 8_192  # bytes


class Refusal(ServerRefused):
    """The server said no; come back after `retry_after_s` at the earliest."""

    def __init__(self, code: str, text: str, retry_after_s: float) -> None:
        super().__init__(code, text)
        self.retry_after_s = retry_after_s


class Address(NamedTuple):
    host: str
    port: int
    user: str = ""
    password: str = ""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address(url: str, scheme: str, default_port: int) -> Address:
    """Raises InputError `bad-url`, which shows no password."""
    try:
        parts = urlsplit(url)
        port = parts.port or default_port
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme != scheme or not parts.hostname or not parts.hostname.isascii():
        raise InputError("bad-url", f"cannot use address: expected {scheme}://host[:port], got another form")
    return Address(parts.hostname, port, unquote(parts.username or ""), unquote(parts.password or ""))


def proxy_of(layout: Layout) -> Address | None:
    """The proxy in config.toml. A file that cannot be read must not keep a node from calling for help."""
    from instar.host.config import has_settings, read_config

    with contextlib.suppress(InputError):
        if has_settings(layout) and (text := read_config(layout).network.proxy):
            return address(text, "http", 3128)
    return None


class Wire:
    """An upgraded channel. Made by `dial`; closed by whoever has it."""

    def __init__(self, connection: ssl.SSLSocket, socket_: ClientSocket) -> None:
        self._connection, self._socket = connection, socket_
        self._early: list[Event] = []
        connection.setblocking(False)

    def pin(self) -> str:
        """The SHA-256, hexadecimal, of the certificate that the server showed."""
        return hashlib.sha256(self._connection.getpeercert(binary_form=True) or b"").hexdigest()

    def send(self, message: Message) -> None:
        """Raises ServerUnreachable when it cannot be had out in time."""
        self._socket.send_text(encode(message))
        self._flush()

    def receive(self, within_s: float, others: Iterable[int] = ()) -> list[Message]:
        """The usable messages that came; [] when nothing did, or when one of `others` can be read first.

        Raises ServerUnreachable when the connection has ended, Refusal when HTTP refused it.
        """
        found: list[Message] = []
        for event in self._events(within_s, others):
            if isinstance(event, Text):
                found += self._read(event.data)
            elif isinstance(event, TooLarge):
                self.send(Error("frame-too-large", f"cannot read frame: expected at most {MAX_FRAME} bytes"))
            elif isinstance(event, Rejected):
                raise _rejection(event)
            elif isinstance(event, Closed) and not found:
                words = f"{event.code} {ascii(event.reason)[:200]}"
                raise ServerUnreachable("connection-lost", f"the server closed the channel: {words}")
        return found

    def upgrade(self) -> None:
        """Ask for the WebSocket, and wait for the server's yes. Raises as `receive` does."""
        self._flush()
        end = time.monotonic() + UPGRADE_S
        while (left := end - time.monotonic()) > 0:
            events = self._events(left, ())
            for number, event in enumerate(events):
                if isinstance(event, Opened):
                    self._early = events[number + 1 :]
                    return
                if isinstance(event, Rejected):
                    raise _rejection(event)
                if isinstance(event, Closed):
                    text = f"cannot open the channel: {ascii(event.reason)[:200]}"
                    raise ServerUnreachable("connection-lost", text)
        raise ServerUnreachable("server-silent", f"cannot open the channel: no answer within {UPGRADE_S:g} s")

    def close(self) -> None:
        """Say goodbye, without waiting for it to be heard."""
        self._socket.close()
        with contextlib.suppress(OSError):
            if data := self._socket.take():
                self._connection.send(data)
        self._connection.close()

    def _read(self, text: str) -> list[Message]:
        try:
            return [decode(text)]
        except InputError as problem:
            self.send(Error(problem.code, problem.text))
            return []

    def _events(self, within_s: float, others: Iterable[int]) -> list[Event]:
        early, self._early = self._early, []
        if early:
            return early
        if not self._connection.pending() and not self._readable(within_s, others):
            return []
        try:
            data = self._connection.recv(READ)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return []
        except OSError as error:
            raise _lost(error) from None
        events = self._socket.receive(data)
        self._flush()
        return events

    def _readable(self, within_s: float, others: Iterable[int]) -> bool:
        poller = select.poll()
        for fd in (self._connection.fileno(), *others):
            poller.register(fd, select.POLLIN)
        ready = poller.poll(max(0, round(within_s * 1000)))
        return any(fd == self._connection.fileno() for fd, _ in ready)

    def _flush(self) -> None:
        view = memoryview(self._socket.take())
        end = time.monotonic() + SEND_S
        poller = select.poll()
        poller.register(self._connection.fileno(), select.POLLIN | select.POLLOUT)
        while view:
            try:
                view = view[self._connection.send(view) :]
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                left = end - time.monotonic()
                if left <= 0:
                    text = f"cannot send: the peer took nothing for {SEND_S:g} s"
                    raise ServerUnreachable("connection-lost", text) from None
                poller.poll(min(left * 1000, 50.0))
            except OSError as error:
                raise _lost(error) from None


def dial(layout: Layout, header: str) -> Wire:
    """Key and certificates are read anew each time.

    Raises ServerUnreachable, Refusal, MachineError (`not-enrolled`, `bad-identity`) or InputError `bad-url`.
    """
    server = address(read_node(layout).server, "https", 443)
    context = client_context(layout.ca, layout.certificate, layout.key)
    try:
        connection = _secured(server, proxy_of(layout), context)
    except ssl.SSLCertVerificationError as error:
        text = f"cannot trust {server}: {error.verify_message}"
        raise ServerUnreachable("server-not-trusted", text) from None
    except OSError as error:
        words = str(error) or type(error).__name__
        raise ServerUnreachable("server-unreachable", f"cannot reach {server}: {words}") from None
    wire = Wire(connection, ClientSocket(str(server), PATH, {"Instar-Program": header}, MAX_FRAME))
    try:
        wire.upgrade()
    except InstarError:
        connection.close()
        raise
    return wire


def _secured(server: Address, proxy: Address | None, context: ssl.SSLContext) -> ssl.SSLSocket:
    first = proxy or server
    plain = socket.create_connection((first.host, first.port), CONNECT_S)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if proxy is not None:
            _through(plain, server, proxy)
        return context.wrap_socket(plain, server_hostname=server.host)  # within the time-out of `plain`
    except BaseException:
        plain.close()
        raise


def _through(plain: socket.socket, server: Address, proxy: Address) -> None:
    from binascii import b2a_base64

    lines = [f"CONNECT {server} HTTP/1.1", f"Host: {server}"]
    if proxy.user:
        pair = b2a_base64(f"{proxy.user}:{proxy.password}".encode(), newline=False).decode()
        lines.append(f"Proxy-Authorization: Basic {pair}")
    plain.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
    answer, end = b"", time.monotonic() + CONNECT_S
    while b"\r\n\r\n" not in answer:
        if len(answer) > PROXY_ANSWER or time.monotonic() > end or not (byte := plain.recv(1)):
            raise OSError("the proxy gave no usable answer")
        answer += byte
    words = answer.split(b" ", 2)
    if not answer.startswith(b"HTTP/1.") or words[1:2] != [b"200"]:
        raise OSError(f"expected 200 from the proxy, got {ascii(b' '.join(words[1:2]))[:20]}")


def say(text: str) -> None:
    """A line in the role's log."""
    print(f"instar beacon: {text}", file=sys.stderr, flush=True)


def refusal(message: Refused) -> Refusal:
    """What the server's `refused` means for whoever called."""
    words = f"refused: {message.message[:300]!a}"
    return Refusal(message.code[:64], words, max(message.retry_after_s, 0.0))


def _lost(error: OSError) -> ServerUnreachable:
    words = error.strerror or str(error) or type(error).__name__
    return ServerUnreachable("connection-lost", f"the connection broke: {words}")


def _rejection(event: Rejected) -> Refusal:
    code, text = f"http-{event.status}", f"expected HTTP 101, got {event.status}"
    try:
        said = json.loads(event.body)["error"]
        code, text = str(said["code"])[:64], str(said["message"])[:500]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass  # somebody else answered: the status must do
    return Refusal(code, f"cannot open the channel: {text!a}", max(event.retry_after_s, 1.0))
