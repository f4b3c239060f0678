"""The client of a node's updater: TLS with an operator's certificate, and proof that it is that node.

The node's certificate names no host, so it is known by its URI; nothing is sent before that was looked at.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import random
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from instar.core.errors import InputError, InstarError, ServerRefused, ServerUnreachable, TrustError

CONNECT_S, ANSWER_S = 10.0, 60.0
EVENT_S = 30.0  # the updater says something at least every 10 s
BLOCK = 262_144
BACK_WITHIN_S = 30.0  # an updater that was replaced answers again (requirement D8)
AGAIN_S = 0.3
HANDS_OVER_S = 2.0  # while it becomes another release, or leaves and is started again, nobody answers

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Papers(NamedTuple):
    certificate: Path
    key: Path
    ca: Path


class Updater:
    """The updater of `node` at `address`, HOST:PORT.

    Every call raises ServerUnreachable, ServerRefused (with the updater's own code), TrustError
    `not-this-node` when somebody else is there, InputError for papers and addresses that cannot be used.
    """

    def __init__(self, address: str, node: str, papers: Papers) -> None:
        self._host, self._port = _split(address)
        self._node, self._address = node, address
        try:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self._context.minimum_version = ssl.TLSVersion.TLSv1_2
            self._context.check_hostname = False  # its URI is looked at in place of that
            self._context.load_verify_locations(str(papers.ca))
            self._context.load_cert_chain(str(papers.certificate), str(papers.key))
        except (OSError, ssl.SSLError) as error:
            raise InputError("bad-papers", f"cannot use {papers.certificate}: {error}") from None

    def look(self, path: str) -> Any:
        """What is there, decoded. Asked again for a moment where nobody answers."""
        end = time.monotonic() + HANDS_OVER_S
        while True:
            try:
                return self.call("GET", path)
            except ServerUnreachable:
                if time.monotonic() + AGAIN_S > end:
                    raise
            time.sleep(AGAIN_S * random.uniform(1.0, 1.5))

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The decoded answer."""
        data = None if body is None else json.dumps(body).encode()
        with self._talking() as connection:
            connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
            return _answer(connection.getresponse())

    def push(self, line: str, file: Path, progress: Progress) -> dict[str, Any]:
        """Send a parcel, a block at a time; what the updater made of it, with its `tx`."""
        try:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha384").hexdigest()
                size = stream.tell()
                stream.seek(0)
                with self._talking() as connection:
                    _send_head(connection, line, size, digest)
                    _send_body(connection, iter(lambda: stream.read(BLOCK), b""), size, progress)
                    return dict(_answer(connection.getresponse()))
        except OSError as error:
            raise InputError("no-file", f"cannot read {file}: {error.strerror}") from error

    def events(self, tx: str, until: float) -> Iterator[dict[str, Any]]:
        """The transaction as it changes, from one connection: it may end before the transaction does, and ends at
        `until` (monotonic time). {} now and then, when nothing has changed."""
        with self._talking() as connection:
            stream = connection.sock  # which the connection forgets with the answer's head
            connection.request("GET", f"/v1/transactions/{tx}/events")
            answer = connection.getresponse()
            if answer.status != 200:
                _answer(answer)
            for line in _lines(stream, answer, until):
                if line.startswith(b"event: gone"):
                    raise ServerRefused("not-begun", f"cannot follow {tx}: nothing came of it")
                if line.startswith(b"data: "):
                    yield dict(json.loads(line[6:]))
                elif line.startswith(b":"):
                    yield {}

    def follow(self, tx: str, within_s: float, away_s: float = BACK_WITHIN_S) -> Iterator[dict[str, Any]]:
        """The transaction as it changes, to its end, but for `within_s` at most; also while the updater itself is
        replaced, or the machine boots: it may be away for `away_s` at a time. {} now and then."""
        heard = time.monotonic()
        until = heard + within_s
        while time.monotonic() < until:
            try:
                for shown in self.events(tx, until):
                    heard = time.monotonic()
                    yield shown
                    if shown and shown["finished"]:
                        return
            except ServerUnreachable:
                if time.monotonic() - heard > away_s:
                    raise
            time.sleep(AGAIN_S)

    def comes_back(self, digest: str, within_s: float = BACK_WITHIN_S) -> dict[str, Any]:
        """Wait until the updater answers as the program `digest`; its health. Raises ServerUnreachable."""
        end = time.monotonic() + within_s
        while True:
            fault: InstarError | None = None
            try:
                health = dict(self.call("GET", "/v1/health"))
                if health["digest"] == digest:
                    return health
            except ServerUnreachable as error:
                fault = error
            if time.monotonic() > end:
                raise fault or ServerUnreachable("not-back", "the updater answers, but as another release")
            time.sleep(AGAIN_S)

    @contextlib.contextmanager
    def _talking(self) -> Iterator[http.client.HTTPSConnection]:
        connection = http.client.HTTPSConnection(
            self._host, self._port, timeout=CONNECT_S, context=self._context
        )
        try:
            connection.connect()
            self._check(connection)
            connection.sock.settimeout(ANSWER_S)
            yield connection
        except ssl.SSLCertVerificationError as error:
            text = f"cannot trust {self._address}: {error.verify_message}"
            raise TrustError("not-this-node", text) from error
        except ssl.SSLError as error:
            if "ALERT" not in (error.reason or "").upper():
                raise self._unreachable(error) from error
            text = f"cannot use {self._address}: it refuses this certificate ({error.reason})"
            raise ServerRefused("certificate-refused", text) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    def _unreachable(self, error: Exception) -> ServerUnreachable:
        words = str(error) or type(error).__name__
        return ServerUnreachable("unreachable", f"cannot reach the updater at {self._address}: {words}")

    def _check(self, connection: http.client.HTTPSConnection) -> None:
        assert isinstance(connection.sock, ssl.SSLSocket)
        names = (connection.sock.getpeercert() or {}).get("subjectAltName", ())
        wanted = (("URI", f"instar://node/{self._node}"),)
        if names != wanted:
            found = ", ".join(str(name[1]) for name in names)[:200]
            text = f"cannot trust {self._address}: expected {wanted[0][1]}, got {found or 'no name'}"
            raise TrustError("not-this-node", text)


def _split(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        text = f"cannot use the address: expected HOST:PORT, got {address!a:.100}"
        raise InputError("bad-address", text)
    return host.strip("[]"), int(port)


def _send_head(connection: http.client.HTTPSConnection, line: str, size: int, digest: str) -> None:
    connection.putrequest("POST", f"/v1/push?line={quote(line, safe='')}")  # as it was typed
    connection.putheader("Content-Type", "application/octet-stream")
    connection.putheader("Content-Length", str(size))
    connection.putheader("Instar-SHA384", digest)
    connection.endheaders()


def _send_body(
    connection: http.client.HTTPSConnection, blocks: Iterator[bytes], size: int, progress: Progress
) -> None:
    """Stop as soon as there is an answer: what it says is why no more is wanted."""
    done = 0
    for block in blocks:
        if select.select([connection.sock], [], [], 0)[0]:
            return
        try:
            connection.send(block)
        except (BrokenPipeError, ConnectionResetError):
            return  # the answer may be there all the same
        done += len(block)
        progress(done, size)


def _lines(stream: socket.socket, answer: http.client.HTTPResponse, until: float) -> Iterator[bytes]:
    """Lines as they come, before `until`. Raises OSError when the updater has been silent for too long."""
    while (left := until - time.monotonic()) > 0:
        stream.settimeout(min(left, EVENT_S))
        try:
            line = answer.readline()
        except TimeoutError:
            if left > EVENT_S:
                raise
            return
        if not line:
            return
        yield line


def _answer(answer: http.client.HTTPResponse) -> Any:
    data = answer.read()
    if answer.status < 300:
        return json.loads(data)
    try:
        error = json.loads(data)["error"]
        code, text = str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        code, text = "bad-answer", f"the updater answered {answer.status} without saying why"
    raise (ServerUnreachable if answer.status >= 500 else ServerRefused)(code, text)
