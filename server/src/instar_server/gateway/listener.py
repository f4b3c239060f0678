"""The sockets for nodes: TLS, bounds on slow newcomers, start and stop."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from instar.core.errors import MachineError
from instar_server.gateway.answers import Handler, errors
from instar_server.gateway.channels import Channels
from instar_server.gateway.identity import make_middleware
from instar_server.gateway.nodes import MAX_EVENTS
from instar_server.services.standing import Standing

HANDSHAKE_S = 15.0
FIRST_REQUEST_S = 15.0  # from the handshake to the end of the first request's headers
KEEPALIVE_S = 75.0
TRIM_S = 60.0
NO_CHECK_TIME = ssl.VerifyFlags(0x200000)  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME


def tls_context(certificate: Path, ca: str) -> ssl.SSLContext:
    """`certificate` holds key and certificate, `ca` is PEM. Client certificates are asked for, and checked if shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate)
    context.load_verify_locations(cadata=ca)
    context.verify_mode = ssl.CERT_OPTIONAL
    # Signature, purpose and chain are checked here; the times are not: a handshake cannot say what would help, and
    # a node that was off for long must come as far as its renewal. `Standing` looks at the times of each serial.
    context.verify_flags |= NO_CHECK_TIME
    # OpenSSL's two tickets a handshake are 0.3 ms of its 1.3; one is enough to come back with. A resumed
    # connection is no way around a revocation: that is looked at on every request, whatever the handshake was.
    context.num_tickets = 1
    return context


def is_worth_a_line(record: logging.LogRecord) -> bool:
    """False for what was no HTTP: it is answered and cut off, and a traceback for each would let any
    stranger fill the log."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)


class Gateway:
    """One port that serves `routes`; `channels` if they are among them."""

    def __init__(
        self,
        standing: Standing,
        routes: list[web.RouteDef],
        channels: Channels | None,
        now: Callable[[], float],
    ) -> None:
        self._channels, self._now = channels, now
        self._newcomers: dict[Any, float] = {}
        app = web.Application(
            middlewares=[self._arrived_middleware(), errors, make_middleware(standing)],
            client_max_size=MAX_EVENTS,
        )
        app.add_routes(routes)
        self._runner = web.AppRunner(
            app, access_log=None, keepalive_timeout=KEEPALIVE_S, auto_decompress=False, shutdown_timeout=3.0
        )
        logging.getLogger("aiohttp.server").addFilter(is_worth_a_line)
        self._server: asyncio.AbstractServer | None = None

    def _arrived_middleware(self) -> Any:
        @web.middleware
        async def arrived(request: web.Request, handler: Handler) -> web.StreamResponse:
            self._newcomers.pop(request.protocol, None)
            return await handler(request)

        return arrived

    async def start(self, host: str, port: int, context: ssl.SSLContext) -> int:
        """Listen. The port, for `port` 0 whichever was free. Raises MachineError `cannot-listen`."""
        await self._runner.setup()
        make = self._runner.server
        assert make is not None

        def newcomer() -> asyncio.Protocol:
            protocol = make()
            self._newcomers[protocol] = self._now()
            return protocol

        try:
            self._server = await asyncio.get_running_loop().create_server(
                newcomer,
                host,
                port,
                ssl=context,
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=2.0,
                backlog=4096,
                family=socket.AF_UNSPEC,
            )
        except OSError as error:
            raise MachineError(
                "cannot-listen", f"cannot listen on {host}:{port}: {error.strerror}"
            ) from error
        return int(self._server.sockets[0].getsockname()[1])

    async def tend(self) -> None:
        """Until cancelled: cut connections that never ask, and give freed memory back."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        trimmed = self._now()
        while True:
            await asyncio.sleep(FIRST_REQUEST_S / 3)
            now = self._now()
            late = [
                protocol
                for protocol, at in self._newcomers.items()
                if now - at > HANDSHAKE_S + FIRST_REQUEST_S
            ]
            for protocol in late:
                del self._newcomers[protocol]
                protocol.force_close()
            if trim is not None and now - trimmed >= TRIM_S:
                trimmed = now
                trim(0)

    def stop_accepting(self) -> None:
        if self._server is not None:
            self._server.close()

    async def stop(self, within_s: float) -> None:
        """End every channel with a word, then every connection."""
        self.stop_accepting()
        if self._channels is not None:
            await self._channels.stop(within_s)
        await self._runner.cleanup()
