"""The updater's local socket: the old protocol of one line, and HTTP for whoever begins with a word of it.

The first byte tells them apart: `{` begins a line of JSON, a capital letter an HTTP method. What HTTP needs is
imported when it first comes.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instar.core.errors import InputError, InstarError
from instar.host.sockets import MOST_BYTES
from instar.updater.http.listener import Admit, Listener

if TYPE_CHECKING:
    from instar.updater.http.calls import Services
    from instar.updater.http.serve import Secure

CLIENT_S = 5.0  # for one client's line

Handler = Callable[[dict[str, Any]], dict[str, Any]]
Wiring = Callable[[], "Services"]


class Api:
    """Both ports. `wiring` makes what the HTTP calls work with, once, when the first one comes."""

    def __init__(self, path: Path, api: str, handlers: dict[str, Handler], wiring: Wiring) -> None:
        self._handlers, self._wiring = handlers, wiring
        self._services: Services | None = None
        self._secure: Secure | None = None
        self._listener = Listener(path, api, self._serve_local, self._serve_remote)

    def start(self) -> None:
        self._listener.start()

    def leave(self) -> bool:
        """Whether nobody is being served; nobody is from then on."""
        return self._listener.leave()

    def stay(self) -> None:
        """Take `leave` back."""
        self._listener.stay()

    def _serve_remote(self, connection: socket.socket, address: str, admit: Admit) -> None:
        if self._secure is None:  # twice, when two come at once, does no harm
            from instar.updater.http.serve import Secure

            self._secure = Secure(self._wired())
        self._secure.serve(connection, address, admit)

    def _serve_local(self, connection: socket.socket) -> None:
        connection.settimeout(CLIENT_S)
        first = connection.recv(16_384)
        uid = _peer(connection)
        if first[:1].isalpha() and first[:1].isupper():
            from instar.updater.http.serve import serve

            caller = f"local:{uid}" if _may(uid) else _not_allowed(uid)
            serve(connection, first, caller, self._wired())
            return
        with contextlib.suppress(OSError):
            connection.settimeout(CLIENT_S)
            connection.sendall(json.dumps(self._answer(connection, first, uid)).encode() + b"\n")

    def _wired(self) -> Services:
        if self._services is None:
            self._services = self._wiring()
        return self._services

    def _answer(self, connection: socket.socket, first: bytes, uid: int) -> dict[str, Any]:
        try:
            if not _may(uid):
                raise _not_allowed(uid)
            request = _read(connection, first)
            handler = self._handlers.get(str(request.get("do")))
            if handler is None:
                raise InputError("unknown-request", f"expected one of {sorted(self._handlers)}")
            return {"ok": True, **handler(request)}
        except InstarError as error:
            return {"ok": False, "error": error.as_json()}


def _read(connection: socket.socket, line: bytes) -> dict[str, Any]:
    end = time.monotonic() + CLIENT_S
    while not line.endswith(b"\n"):
        connection.settimeout(max(0.001, end - time.monotonic()))  # for the whole, not for each piece of it
        chunk = connection.recv(16_384) if line else b""
        line += chunk
        if not chunk or len(line) > MOST_BYTES:
            raise InputError("bad-request", f"expected one line of at most {MOST_BYTES} bytes")
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError("bad-request", "expected a line of JSON") from None
    if not isinstance(request, dict):
        raise InputError("bad-request", "expected a JSON object")
    return request


def _peer(connection: socket.socket) -> int:
    """The user id of the process at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("iII", credentials)[1])


def _may(uid: int) -> bool:
    return uid in (0, os.getuid())


def _not_allowed(uid: int) -> InputError:
    return InputError("not-allowed", f"user {uid} may not use this socket")
