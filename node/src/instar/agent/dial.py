"""From nothing to an encrypted stream: name, TCP, the proxy's CONNECT where there is one, mutual TLS."""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import contextlib
import socket
import ssl
import threading
from binascii import b2a_base64
from typing import Any

from instar.agent.node import Address
from instar.core.errors import ServerUnreachable
from instar.host.layout import Layout
from instar.host.tls import client_context

# asyncio zero-fills a read buffer of 256 KiB for each TLS connection; our frames are small.
asyncio.sslproto.SSLProtocol.max_size = 16_384

DIAL_WITHIN_S = 20.0  # name, TCP, proxy and TLS together
STREAM_LIMIT = 16_384  # bytes that wait in the stream before the peer is slowed down
PROXY_ANSWER = 8_192  # bytes of a proxy's answer before it is given up

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Dialer:
    """Dials one node's server. Key and certificates are read anew each time, so renewal needs no word."""

    def __init__(self, layout: Layout, server: Address, proxy: Address | None = None) -> None:
        self.layout, self.server, self.proxy = layout, server, proxy

    async def dial(self, within_s: float = DIAL_WITHIN_S) -> Stream:
        """Raises ServerUnreachable, or MachineError `bad-identity`, within `within_s`."""
        context = client_context(self.layout.ca, self.layout.certificate, self.layout.key)
        try:
            async with asyncio.timeout(within_s):
                return await self._dial(context, within_s)
        except TimeoutError as error:
            raise self._unreachable(f"no connection within {within_s:g} s") from error
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise self._unreachable(_words(error)) from error

    async def _dial(self, context: ssl.SSLContext, within_s: float) -> Stream:
        """Each address in turn; none may use up the others' time."""
        first = self.proxy or self.server
        problem: OSError | None = None
        places = await resolve(first.host, first.port)
        for place in places:
            try:
                async with asyncio.timeout(within_s / len(places)):
                    if self.proxy is not None:
                        return await self._through_proxy(place, context, self.proxy)
                    return await asyncio.open_connection(
                        *place, ssl=context, server_hostname=self._tls_name, limit=STREAM_LIMIT
                    )
            except OSError as error:  # TimeoutError is one
                problem = error
        raise problem or OSError(f"{first.host} has no address")

    @property
    def _tls_name(self) -> Any:
        """In bytes, which ssl takes as they are. A str it encodes by 'idna', whose tables take 700 KiB."""
        return self.server.host.encode("ascii")

    async def _through_proxy(self, place: tuple[str, int], context: ssl.SSLContext, proxy: Address) -> Stream:
        reader, writer = await asyncio.open_connection(*place, limit=STREAM_LIMIT)
        try:
            writer.write(_connect_request(self.server, proxy))
            answer = await reader.readuntil(b"\r\n\r\n")
            status = answer.split(b" ", 2)[1:2]
            if not answer.startswith(b"HTTP/1.") or status != [b"200"] or len(answer) > PROXY_ANSWER:
                got = b" ".join(status)[:20].decode("ascii", "replace") or "no HTTP"
                raise OSError(f"expected 200 from the proxy, got {got}")
            await writer.start_tls(context, server_hostname=self._tls_name)
        except BaseException:
            writer.transport.abort()
            raise
        return reader, writer

    def _unreachable(self, words: str) -> ServerUnreachable:
        way = f" through the proxy {self.proxy}" if self.proxy else ""
        return ServerUnreachable("server-unreachable", f"cannot reach {self.server}{way}: {words}")


async def resolve(host: str, port: int) -> list[tuple[str, int]]:
    """The addresses of `host`. Raises OSError.

    A look-up cannot be cancelled and may hang for many seconds. It gets a thread of its own that
    does not hold up the end of the process; asyncio's thread pool would.
    """
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, host)
            return [(host, port)]
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[tuple[str, int]]] = loop.create_future()

    def settle(places: list[tuple[str, int]], error: OSError | None) -> None:
        if found.done():
            return
        if error is None:
            found.set_result(places)
        else:
            found.set_exception(error)

    def look_up() -> None:
        places: list[tuple[str, int]] = []
        problem: OSError | None = None
        try:
            rows = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
            places = [(str(row[4][0]), port) for row in rows]
        except OSError as error:
            problem = error
        with contextlib.suppress(RuntimeError):  # the loop may be gone by now
            loop.call_soon_threadsafe(settle, places, problem)

    threading.Thread(target=look_up, name="resolve", daemon=True).start()
    return await found


def _connect_request(server: Address, proxy: Address) -> bytes:
    lines = [f"CONNECT {server} HTTP/1.1", f"Host: {server}"]
    if proxy.user:
        pair = b2a_base64(f"{proxy.user}:{proxy.password}".encode(), newline=False).decode()
        lines.append(f"Proxy-Authorization: Basic {pair}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate was not accepted: {error.verify_message}"
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return str(error) or type(error).__name__
