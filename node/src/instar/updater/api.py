"""The updater's local API: a thread that answers on a Unix socket while the main thread works.

Under systemd the socket is handed in (LISTEN_FDS) and outlives the updater.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instar.core.errors import InputError, InstarError
from instar.host.sockets import MOST_BYTES

CLIENT_S = 5.0  # for one client's request
AGAIN_S = 0.2  # after an accept that failed
SYSTEMD_FD = 3  # sd_listen_fds(3)

Handler = Callable[[dict[str, Any]], dict[str, Any]]


class LocalApi:
    """Serves one request per connection, one connection at a time; each is bounded."""

    def __init__(self, path: Path, handlers: dict[str, Handler]) -> None:
        self._handlers = handlers
        self._listener = _handed_in() or _bound(path)
        self._thread = threading.Thread(target=self._run, name="local-api", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # out of descriptors, or the client went away: the next one may be luckier
                time.sleep(AGAIN_S)
                continue
            with connection, contextlib.suppress(OSError):
                connection.settimeout(CLIENT_S)
                connection.sendall(json.dumps(self._answer(connection)).encode() + b"\n")

    def _answer(self, connection: socket.socket) -> dict[str, Any]:
        try:
            _check_peer(connection)
            request = _read(connection)
            handler = self._handlers.get(str(request.get("do")))
            if handler is None:
                raise InputError("unknown-request", f"expected one of {sorted(self._handlers)}")
            return {"ok": True, **handler(request)}
        except InstarError as error:
            return {"ok": False, "error": error.as_json()}


def _read(connection: socket.socket) -> dict[str, Any]:
    line, end = b"", time.monotonic() + CLIENT_S
    while not line.endswith(b"\n"):
        connection.settimeout(max(0.001, end - time.monotonic()))  # for the whole: others wait behind it
        chunk = connection.recv(16_384)
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


def _check_peer(connection: socket.socket) -> None:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, uid, _ = struct.unpack("iII", credentials)
    if uid not in (0, os.getuid()):
        raise InputError("not-allowed", f"user {uid} may not use this socket")


def _handed_in() -> socket.socket | None:
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        return None
    return socket.socket(fileno=SYSTEMD_FD)


def _bound(path: Path) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(old)
    listener.listen(16)
    return listener
