"""The API's socket: uvicorn in the server's own loop, ended by the server and not by signals."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from instar.core.errors import MachineError

MOST_CONNECTIONS = 512
KEPT_S = 15  # longer than clients do (httpx: 5 s): who closes first may do so as the next request comes


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The whole server ends in one order; uvicorn must not take the signals for itself."""
        yield


class WebListener:
    """`certificate` is the file with key and certificate; None serves plain HTTP."""

    def __init__(self, app: FastAPI, certificate: Path | None) -> None:
        self._config = uvicorn.Config(
            app,
            loop="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=KEPT_S,
            timeout_graceful_shutdown=2,
            ssl_certfile=certificate,
        )
        self._server = _Uvicorn(self._config)
        self._task: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen. The real port. Raises MachineError `cannot-listen`."""
        try:
            sock = socket.create_server(
                (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
            )
        except OSError as error:
            raise MachineError(
                "cannot-listen", f"cannot listen on {host}:{port}: {error.strerror}"
            ) from error
        real = int(sock.getsockname()[1])
        self._task = asyncio.create_task(self._server.serve([sock]))
        while not self._server.started:
            if self._task.done():
                raise MachineError("cannot-listen", f"cannot serve the API on {host}:{port}")
            await asyncio.sleep(0.005)
        return real

    def reload(self, certificate: Path) -> None:
        """Use the new certificate for new connections."""
        if isinstance(self._config.ssl, ssl.SSLContext):
            self._config.ssl.load_cert_chain(certificate)

    async def stop(self, within_s: float) -> None:
        if self._task is None:
            return
        self._server.should_exit = True
        done, _ = await asyncio.wait({self._task}, timeout=within_s)
        if not done:
            self._server.force_exit = True
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
