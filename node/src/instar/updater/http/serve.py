"""One connection from its first byte to its last: TLS, who calls, request by request."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import ssl
import time
from typing import Any

from instar.core.errors import InputError, InstarError, MachineError
from instar.host.files import failed
from instar.host.layout import Layout
from instar.host.tls import server_context
from instar.updater.http.answers import Answer, Stream, encode, encode_stream_head, refusal
from instar.updater.http.calls import Call, Services
from instar.updater.http.connection import Body, Connection, GoneError
from instar.updater.http.heads import Head, parse
from instar.updater.http.listener import Admit
from instar.updater.http.routes import NoMethodError, find, handle

HANDSHAKE_S = 5.0
MOST_REQUESTS = 100  # on one connection
GOODBYE_S = 1.0
SAY_EVERY_S = 60.0  # about strangers
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
OPERATOR = re.compile(r"instar://operator/([a-z0-9][a-z0-9._-]{0,62})")

log = logging.getLogger("instar.updater")

Caller = str | InstarError  # who calls, or why he may not


class Secure:
    """Serves connections over TLS. The certificate is read anew when its file has changed: nodes renew theirs."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._context: tuple[tuple[int, ...], ssl.SSLContext] | None = None
        self._say_from = 0.0

    def serve(self, connection: socket.socket, address: str, admit: Admit) -> None:
        """`admit` is called once an operator has shown his certificate; anybody else is told at once, and
        no word of his is read."""
        try:
            context = self._made(self._services.layout)
            connection.settimeout(HANDSHAKE_S)
            secure = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        except (MachineError, OSError) as error:
            self._say(address, error)
            return
        with secure:
            try:
                secure.do_handshake()
            except OSError as error:
                self._say(address, error)
                return
            caller = caller_of(secure.getpeercert())
            if isinstance(caller, InstarError):
                _turn_away(secure, caller)
                return
            try:
                admit()
            except MachineError as error:
                _turn_away(secure, error)
                return
            serve(secure, b"", caller, self._services)
            with contextlib.suppress(OSError, ValueError):
                secure.settimeout(GOODBYE_S)
                secure.unwrap()

    def _made(self, layout: Layout) -> ssl.SSLContext:
        paths = (layout.ca, layout.certificate, layout.key)
        try:
            stamp = tuple(path.stat().st_mtime_ns for path in paths)
        except OSError as error:
            raise failed("read", layout.identity, error) from None
        kept = self._context
        if kept is None or kept[0] != stamp:
            kept = self._context = (stamp, server_context(*paths))
        return kept[1]

    def _say(self, address: str, error: Exception) -> None:
        now = time.monotonic()
        if now >= self._say_from:
            self._say_from = now + SAY_EVERY_S
            log.warning(
                "the API has turned %s away: %s", address, ascii(str(error) or type(error).__name__)[1:-1]
            )


def _turn_away(secure: ssl.SSLSocket, why: InstarError) -> None:
    connection = Connection(secure)
    with contextlib.suppress(GoneError):
        connection.send(encode(refusal(why), keeps=False))
        connection.finish()


def caller_of(certificate: Any) -> Caller:
    """The operator that a verified certificate names, else the refusal `not-an-operator`."""
    uris = [value for kind, value in (certificate or {}).get("subjectAltName", ()) if kind == "URI"]
    match = OPERATOR.fullmatch(uris[0]) if len(uris) == 1 else None
    if match is None:
        named = ascii(uris[0])[1:-1][:80] if uris else "nobody"
        text = (
            f"cannot serve: expected an operator's certificate (instar://operator/NAME), got one of {named}"
        )
        return InputError("not-an-operator", text)
    return f"operator:{match[1]}"


def serve(sock: socket.socket, peeked: bytes, caller: Caller, services: Services) -> None:
    """Requests until one side has had enough. The caller closes the socket."""
    connection = Connection(sock, peeked)
    with contextlib.suppress(GoneError):
        for number in range(MOST_REQUESTS):
            if not _one(connection, caller, services, number):
                return


def _one(connection: Connection, caller: Caller, services: Services, number: int) -> bool:
    """Take one request and answer it; whether another may follow."""
    body: Body | None = None
    head: Head | None = None
    try:
        head = parse(connection.head(first=number == 0))
        if isinstance(caller, InstarError):
            raise caller
        if "origin" in head.fields:  # a page in a browser that holds an operator's certificate
            raise InputError("not-allowed", "cannot serve: expected a program, got a page in a browser")
        body = Body(connection, head.length) if head.length > 0 else None
        route, words = find(head.method, head.path)
        asked = head.fields.get("expect", "").lower() == "100-continue"
        go_on = (lambda: connection.send(CONTINUE)) if asked and body else (lambda: None)
        answer = handle(Call(services, head, words, caller, body, go_on), route)
    except NoMethodError as error:
        answer = refusal(error, (("Allow", ", ".join(error.allowed)),))
    except InstarError as error:
        answer = refusal(error)
    except OSError as error:
        answer = refusal(failed("answer for", services.layout.state, error))
    if isinstance(answer, Stream):
        connection.send(encode_stream_head())
        for part in answer.parts:
            connection.send(part)
        return False
    return _answer(connection, answer, head, body, number)


def _answer(
    connection: Connection, answer: Answer, head: Head | None, body: Body | None, number: int
) -> bool:
    unread = head is None or (head.length > 0 and (body is None or body.done < body.length))
    keeps = head is not None and head.keeps and not unread and number < MOST_REQUESTS - 1
    connection.send(encode(answer, keeps, with_body=head is None or head.method != "HEAD"))
    if unread:
        connection.finish()
    return keeps
