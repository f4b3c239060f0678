"""The one way by which anything of an update is fetched: metadata, releases, wishes, verdicts, reports.

Proxy, private CA, client certificate and time-outs are settled here, once, for all of them.
Not safe for use by two threads at once; each takes its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from instar.core.errors import InputError, ServerRefused, ServerUnreachable
from instar.host.tls import client_context

MOST_BYTES = 16 * 1024 * 1024  # of an answer that is held in memory
CHUNK = 65_536


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the server is and how to get there. `proxy` is `http://host:port`, or ''.

    `pin` is the SHA-256, hexadecimal, of the one server certificate (DER) that is accepted; '' for any that
    the fleet's CA signed. `public`: certificates that this machine trusts are accepted, too.
    """

    server: str
    ca: Path
    certificate: Path | None = None
    key: Path | None = None
    proxy: str = ""
    program: str = ""  # value of the Instar-Program header
    timeout_s: float = 20.0
    pin: str = ""
    public: bool = False


class Transport:
    """A kept-alive HTTPS connection that is made when first used, and made again when it broke."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.host, self.port = host_port(endpoint.server, "https", 443)
        self._context: ssl.SSLContext | None = None
        self._connection: http.client.HTTPSConnection | None = None

    def call(self, method: str, path: str, body: Any = None, timeout_s: float | None = None) -> Any:
        """Send JSON, return the answer's JSON.

        Raises ServerUnreachable (no answer, 429, 5xx), ServerRefused (other 4xx, with the server's code),
        MachineError (the node's identity cannot be used).
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data is not None else {}
        answer = self._read(method, path, data, headers, timeout_s)
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            raise ServerUnreachable("bad-answer", f"cannot use {path}: the answer is not JSON") from None

    def get(self, path: str) -> bytes:
        """The bytes at `path`. Raises as `call` does; a missing file is ServerRefused `not-found`."""
        return self._read("GET", path, None, {}, None)

    @contextlib.contextmanager
    def stream(
        self, path: str, start: int, stop: int | None = None
    ) -> Iterator[tuple[bool, Iterator[bytes]]]:
        """The bytes at `path` from `start` up to `stop` (its end), in chunks, and whether the server began there.

        One that knows no ranges begins at 0 and goes on to the end. The connection is closed afterwards unless
        everything was read. Raises as `call` does.
        """
        last = "" if stop is None else stop - 1
        headers = {"Range": f"bytes={start}-{last}"} if start or stop is not None else {}
        response = self._request("GET", path, None, headers, None)
        try:
            yield response.status == 206, self._chunks(response, path)
        finally:
            if not response.isclosed():
                self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._context = None  # the next connection reads certificate and key anew: they are renewed meanwhile

    def _chunks(self, response: http.client.HTTPResponse, path: str) -> Iterator[bytes]:
        try:
            while chunk := response.read(CHUNK):
                yield chunk
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise ServerUnreachable("cut-off", f"cannot read {path} on: {error!r}") from None

    def _read(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], timeout_s: float | None
    ) -> bytes:
        response = self._request(method, path, body, headers, timeout_s)
        parts, size = [], 0
        for chunk in self._chunks(response, path):
            size += len(chunk)
            if size > MOST_BYTES:
                self.close()
                raise ServerUnreachable("bad-answer", f"cannot use {path}: over {MOST_BYTES} bytes")
            parts.append(chunk)
        return b"".join(parts)

    def _request(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], timeout_s: float | None
    ) -> http.client.HTTPResponse:
        timeout = timeout_s or self.endpoint.timeout_s
        for fresh in (self._connection is None, True):
            try:
                connection = self._connected(timeout)
                connection.request(method, path, body, {"Instar-Program": self.endpoint.program, **headers})
                response = connection.getresponse()
            except (OSError, http.client.HTTPException, UnicodeError) as error:  # no host name
                self.close()
                if not fresh and not isinstance(error, TimeoutError):
                    continue  # a kept connection that the server closed meanwhile; every call is idempotent
                raise _unreachable(self.endpoint.server, error) from None
            if response.status < 300:
                return response
            raise self._fault(response, path)
        raise AssertionError("a fresh connection either answers or raises")

    def _connected(self, timeout_s: float) -> http.client.HTTPSConnection:
        if self._connection is None:
            if self._context is None:
                e = self.endpoint
                self._context = client_context(e.ca, e.certificate, e.key, e.public)
            self._connection = self._new_connection(timeout_s, self._context)
        self._connection.timeout = timeout_s
        if self._connection.sock is not None:
            self._connection.sock.settimeout(timeout_s)
        return self._connection

    def _new_connection(self, timeout_s: float, context: ssl.SSLContext) -> http.client.HTTPSConnection:
        if not self.endpoint.proxy:
            return _Connection(self.host, self.port, timeout_s, context, self.endpoint.pin)
        host, port = host_port(self.endpoint.proxy, "http", 3128)
        connection = _Connection(host, port, timeout_s, context, self.endpoint.pin)
        connection.set_tunnel(self.host, self.port)
        return connection

    def _fault(self, response: http.client.HTTPResponse, path: str) -> ServerRefused | ServerUnreachable:
        try:
            said = json.loads(response.read(CHUNK))["error"]
            code, message = str(said["code"]), str(said["message"])
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError):
            code = "not-found" if response.status == 404 else "refused"
            message = f"{path}: HTTP status {response.status}"
        if response.length or code == "certificate-expired":
            self.close()  # more to come than a fault's few words: the connection is of no more use
        if response.status == 429 or response.status >= 500:
            return ServerUnreachable("server-busy", f"cannot use the server now: {message}")
        return ServerRefused(code, message)


class _Connection(http.client.HTTPSConnection):
    """Looks at the certificate right after the handshake: nothing is said to another server."""

    def __init__(self, host: str, port: int, timeout_s: float, context: ssl.SSLContext, pin: str) -> None:
        super().__init__(host, port, timeout=timeout_s, context=context)
        self._pin = pin

    def connect(self) -> None:
        """Raises ServerUnreachable `certificate-differs`."""
        super().connect()
        if not self._pin:
            return
        shown = self.sock.getpeercert(binary_form=True)
        got = hashlib.sha256(shown or b"").hexdigest()
        if got != self._pin:
            self.close()
            text = f"cannot trust this server: expected the certificate {self._pin[:16]}…, got {got[:16]}…"
            raise ServerUnreachable("certificate-differs", text)


def host_port(url: str, scheme: str, default_port: int) -> tuple[str, int]:
    """Host and port of `url`. Raises InputError `bad-url`."""
    try:
        parts = urlsplit(url)
        port = parts.port or default_port
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme != scheme or not parts.hostname:
        raise InputError("bad-url", f"cannot use address: expected {scheme}://host[:port], got {url!r}")
    return parts.hostname, port


def _unreachable(server: str, error: Exception) -> ServerUnreachable:
    if isinstance(error, ssl.SSLCertVerificationError):
        text = f"cannot trust {server}: {error.verify_message} (the fleet's CA did not sign its certificate?)"
        return ServerUnreachable("server-not-trusted", text)
    return ServerUnreachable(
        "server-unreachable", f"cannot reach {server}: {str(error) or type(error).__name__}"
    )
