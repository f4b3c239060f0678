"""The agent's local API: one JSON object a line over run/agent.sock, for root and for our own user.

    {"v": 1, "do": "status" | "health" | "look" | "modules"}
    {"v": 1, "do": "restart", "modules": ["name", …], "agent": false, "within_s": 30}   -> {"ok": true, "id": "c-…"}
    {"v": 1, "do": "command", "id": "c-…"}                                -> how it stands
    {"v": 1, "do": "reload-module", "module": "name"}                     for the updater: `current` has moved
    {"v": 1, "do": "check-module", …}                                     for the updater: agent/check.py
    {"ok": true, …}  or  {"ok": false, "error": {"code", "text"}}

A line that cannot be used gets an error and the connection stays; a line without an end does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from instar.core.errors import InputError, InstarError, MachineError

MOST_BYTES = 65_536  # of one line
MOST_CONNECTIONS = 16
IDLE_S = 60.0  # a connection that asks nothing for so long is closed
ANSWER_WITHIN_S = 5.0  # for a client that does not read
PART_WITHIN_S, PART_READS = 1.0, 64  # for one that is sent away
OBEY_WITHIN_S = 60.0  # for a command to be answered
LONGEST_PATH = 107  # bytes, of a Unix socket's address

log = logging.getLogger("instar.agent")
Handler = Callable[[dict[str, Any], int], Awaitable[dict[str, Any]]]  # of the request and the user who asks


class LocalApi:
    """`handlers` maps `do` to what answers it; it must not block, may wait a while, and may raise InstarError.

    Only the holder of the role lock may open it: it takes the place of a socket left behind.
    """

    def __init__(self, path: Path, handlers: dict[str, Handler]) -> None:
        self._path, self._handlers = path, handlers
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        """Listen. Raises MachineError `no-socket`."""
        if len(os.fsencode(self._path)) > LONGEST_PATH:
            text = f"cannot listen on {self._path}: expected at most {LONGEST_PATH} bytes"
            raise MachineError("no-socket", text)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            listener.bind(str(self._path))
            os.chmod(self._path, 0o600)
            listener.setblocking(False)
            self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=MOST_BYTES)
        except OSError as error:
            listener.close()
            raise MachineError("no-socket", f"cannot listen on {self._path}: {error.strerror}") from error

    def close(self) -> None:
        """Stop listening and drop who is connected. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            refusal = self._refusal(writer)
            if refusal is not None:
                raise refusal
            while line := await _line(reader):
                await _answer(writer, await self._obey(line, peer_uid(writer)))
        except InstarError as error:
            with contextlib.suppress(TimeoutError, OSError):
                await _part(reader, writer, _no(error))
        except (TimeoutError, OSError):
            pass  # it went away, or sat there for too long
        finally:
            self._open.discard(writer)
            writer.close()

    def _refusal(self, writer: asyncio.StreamWriter) -> InstarError | None:
        uid = peer_uid(writer)
        if uid not in (0, os.geteuid()):
            log.warning("local API: user %d was refused", uid)
            text = f"cannot ask: expected root or user {os.geteuid()}, got user {uid}"
            return InputError("not-allowed", text)
        if len(self._open) > MOST_CONNECTIONS:
            text = f"cannot ask now: expected at most {MOST_CONNECTIONS} connections, got one more"
            return MachineError("too-many-connections", text)
        return None

    async def _obey(self, line: bytes, uid: int) -> dict[str, Any]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict) or request.get("v") != 1:
                raise InputError("bad-request", "cannot read request: expected an object with 'v' 1")
            handler = self._handlers.get(str(request.get("do")))
            if handler is None:
                known = ", ".join(self._handlers)
                text = f"cannot obey: expected 'do' of {known}, got {request.get('do')!a:.60}"
                raise InputError("unknown-command", text)
        except InstarError as error:
            return _no(error)
        except (ValueError, RecursionError) as error:
            return _no(InputError("bad-request", f"cannot read request: expected JSON, got {error!s:.80}"))
        return await _obeyed(handler, request, uid)


async def _obeyed(handler: Handler, request: dict[str, Any], uid: int) -> dict[str, Any]:
    try:
        async with asyncio.timeout(OBEY_WITHIN_S):
            return {"ok": True, **await handler(request, uid)}
    except InstarError as error:
        return _no(error)
    except TimeoutError:
        text = f"cannot tell how it ended: expected an end within {OBEY_WITHIN_S:g} s, got none"
        return _no(MachineError("still-under-way", text))


def peer_uid(writer: asyncio.StreamWriter) -> int:
    """The user at the other end, as the kernel knows it."""
    peer = writer.get_extra_info("socket")
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[1])


async def _line(reader: asyncio.StreamReader) -> bytes:
    """The next line; b"" at the end. Raises InputError `line-too-long`, TimeoutError."""
    try:
        async with asyncio.timeout(IDLE_S):
            return await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError:
        return b""
    except asyncio.LimitOverrunError as error:
        text = f"cannot read request: expected at most {MOST_BYTES} bytes in a line, got more"
        raise InputError("line-too-long", text) from error


async def _answer(writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
    writer.write(json.dumps(answer).encode() + b"\n")
    async with asyncio.timeout(ANSWER_WITHIN_S):
        await writer.drain()


async def _part(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
    """Answer, then take away what the client still has under way: a close that leaves some of it unread
    would reach the client as a reset, and cost it the answer."""
    await _answer(writer, answer)
    writer.write_eof()
    async with asyncio.timeout(PART_WITHIN_S):
        for _ in range(PART_READS):
            if not await reader.read(MOST_BYTES):
                return


def _no(error: InstarError) -> dict[str, Any]:
    return {"ok": False, "error": error.as_json()}
