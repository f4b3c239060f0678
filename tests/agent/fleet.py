"""A small fleet for the agent's tests: a CA, a server over real TLS that a test drives, real agent processes."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import os
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import WSMsgType, web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from instar.host.layout import Layout
from instar.host.program import Program
from instar.wire.codec import decode, encode
from instar.wire.messages import Hello, Message, Refused, Welcome

NODE = "n-0123456789abcdef"
VERSION = "1.2.3"
WITHIN_S = 60.0  # where much else runs, a process may take ten seconds for its start
Kind = TypeVar("Kind", bound=Message)


@dataclass
class Authority:
    """The fleet's CA."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test fleet")])
        self.certificate = self._sign(name, name, self.key.public_key(), [x509.BasicConstraints(True, None)])

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(
        self, names: list[x509.GeneralName], life_s: float = 86_400, age_s: float = 60
    ) -> tuple[bytes, bytes]:
        """(certificate, key), both in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        return self.certify(key.public_key(), names, life_s, age_s), key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def certify(
        self, key: Any, names: list[x509.GeneralName], life_s: float = 86_400, age_s: float = 60
    ) -> bytes:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
        extension = x509.SubjectAlternativeName(names)
        signed = self._sign(subject, self.certificate.subject, key, [extension], life_s, age_s)
        return signed.public_bytes(serialization.Encoding.PEM)

    def _sign(
        self,
        subject: x509.Name,
        issuer: x509.Name,
        key: Any,
        extensions: list[x509.ExtensionType],
        life_s: float = 86_400,
        age_s: float = 60,
    ) -> x509.Certificate:
        start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age_s)
        builder = x509.CertificateBuilder(
            issuer,
            subject,
            key,
            x509.random_serial_number(),
            start,
            start + datetime.timedelta(seconds=life_s),
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self.key, hashes.SHA256())


def node_names() -> list[x509.GeneralName]:
    return [x509.UniformResourceIdentifier(f"instar://node/{NODE}")]


class Connection:
    """The server's end of one channel, after hello and welcome."""

    def __init__(self, socket: web.WebSocketResponse, hello: Hello, headers: dict[str, str]) -> None:
        self.socket, self.hello, self.headers = socket, hello, headers
        self.over = asyncio.Event()
        self.close_code: int | None = None

    async def send(self, message: Message) -> None:
        await self.socket.send_str(encode(message))

    async def send_raw(self, text: str) -> None:
        await self.socket.send_str(text)

    async def expect(self, kind: type[Kind], within_s: float = WITHIN_S) -> Kind:
        """The next message of `kind`; others are skipped. Fails when the node goes away instead."""
        async with asyncio.timeout(within_s):
            while True:
                frame = await self.socket.receive()
                if frame.type is not WSMsgType.TEXT:
                    self.over.set()
                    raise AssertionError(f"expected {kind.T}, but the node went away: {frame.type!r}")
                message = decode(frame.data)
                if isinstance(message, kind):
                    return message

    async def gone(self, within_s: float = WITHIN_S) -> int:
        """Wait until the node has closed; the code it gave."""
        async with asyncio.timeout(within_s):
            while (frame := await self.socket.receive()).type is WSMsgType.TEXT:
                pass
        self.over.set()
        return int(frame.data) if frame.type is WSMsgType.CLOSE else 0

    async def cut(self) -> None:
        """Break the connection without a word."""
        transport = self.socket._req.transport if self.socket._req else None
        if transport is not None:
            transport.abort()
        self.over.set()


class Server:
    """Takes hellos, welcomes them, hands each connection to the test."""

    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.connections: asyncio.Queue[Connection] = asyncio.Queue()
        self.welcome: Welcome | None = Welcome(1, "test", ping_s=300.0, health_s=30.0)  # no pong comes
        self.reject: tuple[int, dict[str, Any], dict[str, str]] | None = None
        self.attempts: list[float] = []
        self.renewals: list[dict[str, Any]] = []
        self.renews = True
        self.lapsed = 0  # channels that were refused for it
        self.port = 0
        self._runner: web.AppRunner | None = None

    async def start(self, folder: Path, port: int = 0) -> None:
        certificate, key = self.authority.issue(
            [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
        )
        pair = folder / "server.pem"
        pair.write_bytes(certificate + key)
        (folder / "server-ca.pem").write_bytes(self.authority.pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair)
        context.load_verify_locations(folder / "server-ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= 0x200000  # as at the real one: the times are looked at later
        app = web.Application()
        app.router.add_get("/v1/channel", self._channel)
        app.router.add_post("/v1/renew", self._renew)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port, ssl_context=context, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def connection(self, within_s: float = WITHIN_S) -> Connection:
        async with asyncio.timeout(within_s):
            return await self.connections.get()

    async def _channel(self, request: web.Request) -> web.StreamResponse:
        self.attempts.append(time.monotonic())
        if self.reject is not None:
            status, body, headers = self.reject
            return web.json_response(body, status=status, headers=headers)
        socket = web.WebSocketResponse(max_msg_size=1 << 20)
        await socket.prepare(request)
        hello = decode((await socket.receive(timeout=WITHIN_S)).data)
        assert isinstance(hello, Hello)
        assert request.transport is not None
        shown = request.transport.get_extra_info("peercert")
        if ssl.cert_time_to_seconds(shown["notAfter"]) < time.time():
            self.lapsed += 1
            await socket.send_str(encode(Refused("certificate-expired", "it has run out", 1.0)))
            return socket
        connection = Connection(socket, hello, dict(request.headers))
        if self.welcome is not None:
            await connection.send(self.welcome)
        self.connections.put_nowait(connection)
        await connection.over.wait()
        return socket

    async def _renew(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.renewals.append(body)
        if not self.renews:
            return web.json_response({"error": {"code": "busy", "message": "not now"}}, status=503)
        csr = x509.load_pem_x509_csr(body["csr"].encode())
        certificate = self.authority.certify(csr.public_key(), node_names())
        return web.json_response({"v": 1, "certificate": certificate.decode()})


@dataclass
class Agent:
    """A real process. Its log is in `log`."""

    process: asyncio.subprocess.Process
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self) -> str:
        return self.log.read_text()

    async def wait(self, within_s: float = WITHIN_S) -> int:
        async with asyncio.timeout(within_s):
            return await self.process.wait()

    async def until_said(self, words: str, within_s: float = WITHIN_S) -> None:
        async with asyncio.timeout(within_s):
            while words not in self.said():
                await asyncio.sleep(0.02)


@dataclass
class Place:
    """One node's state folder, and how to start programs of it."""

    layout: Layout
    program: Program
    authority: Authority
    started: list[Agent] = field(default_factory=list)

    def enrol(self, port: int, host: str = "127.0.0.1") -> None:
        certificate, key = self.authority.issue(node_names())
        self.layout.identity.mkdir(parents=True, exist_ok=True)
        self.layout.key.write_bytes(key)
        self.layout.certificate.write_bytes(certificate)
        self.layout.ca.write_bytes(self.authority.pem)
        record = {
            "v": 1,
            "node": NODE,
            "server": f"https://{host}:{port}",
            "group": "default",
            "enrolled": 1.0,
        }
        self.layout.node.write_text(json.dumps(record))

    async def start(self, *args: str, program: Path | None = None, entry: str = "agent") -> Agent:
        log = self.layout.state / f"log-{len(self.started)}"
        command = self.program.command(entry, "--state", str(self.layout.state), *args)
        if program is not None:
            command[command.index(str(self.program.path))] = str(program)
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *command, stderr=stderr, stdin=asyncio.subprocess.DEVNULL, env={"PATH": os.environ["PATH"]}
            )
        self.started.append(Agent(process, log))
        return self.started[-1]

    async def ask(self, request: Any, role: str = "agent") -> dict[str, Any]:
        """One request to the local API."""
        async with asyncio.timeout(WITHIN_S):
            reader, writer = await asyncio.open_unix_connection(self.layout.socket(role))
            raw = request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n"
            writer.write(raw)
            answer: dict[str, Any] = json.loads(await reader.readline())
            writer.close()
            return answer
