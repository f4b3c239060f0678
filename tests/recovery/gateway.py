"""A server that a test plays: real TLS and WebSocket, a real TUF repository, and verdicts as the test says.

Channels in the role `rehearsal` are played to their end here; the others are handed to the test.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import ipaddress
import json
import ssl
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web
from cryptography import x509

from instar.wire.codec import decode, encode
from instar.wire.messages import (
    Ack,
    AgentUpdate,
    AgentUpdateDownloaded,
    AgentUpdateEnded,
    AgentUpdateProgress,
    Hello,
    Job,
    Message,
    Refused,
    Result,
    UpdateAck,
    UpdateBlock,
    UpdateEnd,
    UpdateHave,
    UpdateOffer,
    UpdateState,
    Welcome,
)
from instar_lab.program.build import Program
from instar_server.trust import offline
from instar_server.trust.pack import Release, pack_release
from tests.agent.fleet import Authority, Connection
from tests.trust.world import World, days, now, sha256

NONCE = "0123456789abcdef" * 2
WITHIN_S = 60.0


class Recorded(Connection):
    """Keeps every frame, as (direction, text)."""

    def __init__(self, socket: web.WebSocketResponse, hello: Hello, first: str) -> None:
        super().__init__(socket, hello, {})
        self.frames: list[tuple[str, str]] = [("node", first)]

    async def send(self, message: Message) -> None:
        frame = encode(message)
        self.frames.append(("server", frame))
        await self.socket.send_str(frame)

    async def next(self, within_s: float = WITHIN_S) -> Message | None:
        """The next message; None when the node has gone."""
        async with asyncio.timeout(within_s):
            frame = await self.socket.receive()
        if frame.type is not WSMsgType.TEXT:
            self.over.set()
            return None
        self.frames.append(("node", frame.data))
        return decode(frame.data)

    async def until(self, *kinds: type[Message], within_s: float = WITHIN_S) -> Message:
        """The next message of one of `kinds`; others are passed over."""
        async with asyncio.timeout(within_s):
            while True:
                message = await self.next(within_s)
                assert message is not None, f"the node went away, expected {[kind.T for kind in kinds]}"
                if isinstance(message, kinds):
                    return message


@dataclass
class Gateway:
    """Server and repository of one fleet. `verdicts`: phase -> pass | fail | wait."""

    folder: Path
    authority: Authority
    world: World
    verdicts: dict[str, str] = field(default_factory=lambda: {"rehearsal": "pass", "trial": "pass"})
    served: dict[str, bytes] = field(default_factory=dict)  # path below /v1/targets/ -> other bytes
    asked: list[str] = field(default_factory=list)  # every path
    cut_at: list[int] = field(default_factory=list)  # where the next answers of /v1/targets/ break off
    slow_s: float = 0.0  # before each 256 KiB of a target
    flows: asyncio.Event = field(default_factory=asyncio.Event)  # while it is clear, no target goes on
    events: list[dict[str, Any]] = field(default_factory=list)
    wanted: dict[str, Any] = field(default_factory=dict)
    port: int = 0

    def __post_init__(self) -> None:
        self.calls: asyncio.Queue[Recorded] = asyncio.Queue()
        self.welcome: Welcome | None = Welcome(1, "test", ping_s=300.0, health_s=30.0)  # no pong comes
        self.refuse: Refused | None = None
        self.flows.set()
        self.times: list[float] = []  # of every hello that is not a rehearsal's
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        self.certificate, key = self.authority.issue(names)
        pair = self.folder / "server.pem"
        pair.write_bytes(self.certificate + key)
        (self.folder / "ca.pem").write_bytes(self.authority.pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair)
        context.load_verify_locations(self.folder / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        app = web.Application()
        app.router.add_get("/v1/channel", self._channel)
        app.router.add_get("/v1/metadata/{name}", self._metadata)
        app.router.add_get("/v1/targets/{path:.*}", self._target)
        app.router.add_get("/v1/node/verdict", self._verdict)
        app.router.add_get("/v1/node/wanted", self._wanted)
        app.router.add_post("/v1/node/events", self._events)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=context, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def pin(self) -> str:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(self.certificate.decode())).hexdigest()

    # --- the operator

    def publish(self, program: Program) -> Release:
        release = pack_release(program.data, program.version)
        self._sign(self.world.with_release(release))
        return release

    def publish_core(self, core: Program) -> Release:
        path = f"recovery/core-{core.version}.pyz"
        custom = {"kind": "recovery", "version": core.version, "digest": core.digest}
        release = Release(path, core.data, sha256(core.data), custom)
        self._sign(self.world.with_release(release))
        return release

    def _sign(self, unsigned: bytes) -> None:
        data = self.world.sign_targets(unsigned)
        self.world.repository.publish_targets(data, now())
        self.world.targets_bytes = data

    def drop(self, path: str) -> None:
        """Sign targets without `path`."""
        self._sign(offline.remove_target(self.world.targets_bytes, path, days(90)))

    # --- what nodes ask

    async def _metadata(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        data = self.world.repository.metadata(request.match_info["name"])
        return web.Response(body=data) if data is not None else _absent()

    async def _target(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        self.asked.append(request.path)
        file = self.world.repository.target_file(path)
        data = self.served.get(path) or (file.read_bytes() if file is not None else None)
        if data is None:
            return _absent()
        wanted = request.headers.get("Range", "")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        answer = web.StreamResponse(status=206 if start else 200)
        answer.content_length = len(data) - start
        await answer.prepare(request)
        end = self.cut_at.pop(0) if self.cut_at else len(data)
        for at in range(start, end, 1 << 18):
            await asyncio.sleep(self.slow_s)
            await self.flows.wait()
            await answer.write(data[at : min(at + (1 << 18), end)])
        if end < len(data) and request.transport is not None:
            request.transport.abort()
        return answer

    async def _verdict(self, request: web.Request) -> web.Response:
        verdict = self.verdicts[request.query["phase"]]
        return web.json_response(
            {"v": 1, "verdict": verdict, "reason": {"code": f"test-{verdict}", "text": "so"}}
        )

    async def _wanted(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        return web.json_response({"v": 1, "node": "n", "poll_s": 60.0, "lines": self.wanted})

    async def _events(self, request: web.Request) -> web.Response:
        events = (await request.json())["events"]
        self.events += events
        return web.json_response({"v": 1, "stored": [event["id"] for event in events]})

    async def _channel(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(max_msg_size=1 << 20)
        await socket.prepare(request)
        first = (await socket.receive(timeout=WITHIN_S)).data
        hello = decode(first)
        assert isinstance(hello, Hello)
        connection = Recorded(socket, hello, first)
        if hello.role == "rehearsal":
            await _rehearse(connection)
            return socket
        self.times.append(asyncio.get_running_loop().time())
        if self.refuse is not None:
            await connection.send(self.refuse)
            return socket
        if self.welcome is not None:
            await connection.send(self.welcome)  # and so it stands in what is recorded
        self.calls.put_nowait(connection)
        await connection.over.wait()
        return socket

    async def call(self, *roles: str, within_s: float = WITHIN_S) -> Recorded:
        """The next channel of one of these roles; others that came before are let go."""
        async with asyncio.timeout(within_s):
            while True:
                connection = await self.calls.get()
                if connection.hello.role in roles:
                    return connection
                asyncio.get_running_loop().create_task(_drain(connection))


async def _drain(connection: Recorded) -> None:
    with contextlib.suppress(TimeoutError):
        while await connection.next(60.0) is not None:
            pass


async def _rehearse(connection: Recorded) -> None:
    await connection.send(Welcome(1, "test", 30.0, 300.0))
    await connection.send(Job("j-r", "selftest", "rehearsal", {"nonce": NONCE}))
    result = await connection.until(Result)
    assert isinstance(result, Result)
    await connection.send(Ack(result.id))
    await connection.send(Refused("rehearsal-over", "the rehearsal has ended"))


def _absent() -> web.Response:
    return web.json_response({"error": {"code": "not-found", "message": "no such file"}}, status=404)


# --- the server's side of a recovery


def parcel(world: World, release: Release, kind: str, archive: bytes | None = None) -> bytes:
    """A parcel of `release`, with the metadata that are served now; `archive`: other bytes than the signed."""
    data = release.archive if archive is None else archive
    record = {
        "format": 1,
        "kind": kind,
        "version": release.custom["version"],
        "digest": release.digest,
        "target": release.path,
        "length": len(data),
        "sha256": sha256(data),
    }
    files = {"parcel.json": json.dumps(record).encode()}
    served = world.served()
    files |= {f"metadata/{n}": served[n] for n in sorted(served) if n.endswith(".root.json")}
    files["metadata/timestamp.json"] = served["timestamp.json"]
    for role in ("snapshot", "targets"):
        name, data_of = world.current(role)
        files[f"metadata/{name}"] = data_of
    files["archive"] = data
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o644
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def offer_of(core: Release, data: bytes, block: int = 65_536, window: int = 16) -> UpdateOffer:
    version, digest = core.custom["version"], core.digest
    whole = hashlib.sha384(data).hexdigest()
    return UpdateOffer("u-1", "recovery", version, digest, core.path, len(data), whole, block, window)


async def deliver(
    connection: Recorded, offer: UpdateOffer, data: bytes, most: int | None = None
) -> tuple[UpdateHave, UpdateState | None]:
    """Send `data` in blocks, never more than the window ahead. `most`: stop after so many blocks."""
    await connection.send(offer)
    have = await connection.until(UpdateHave, UpdateState)
    if isinstance(have, UpdateState):
        return UpdateHave(offer.id, "", 0, 0, 0), have
    assert isinstance(have, UpdateHave)
    blocks = [data[at : at + have.block] for at in range(0, len(data), have.block)]
    acked = have.have
    for n in range(have.have, len(blocks)):
        if most is not None and n >= most:
            return have, None
        while n >= acked + have.window:
            ack = await connection.until(UpdateAck, UpdateState)
            if isinstance(ack, UpdateState):
                return have, ack
            assert isinstance(ack, UpdateAck)
            acked = ack.n
        await connection.send(UpdateBlock(offer.id, n, base64.b64encode(blocks[n]).decode()))
    await connection.send(UpdateEnd(offer.id, hashlib.sha384(data).hexdigest()))
    state = await connection.until(UpdateState)
    assert isinstance(state, UpdateState)
    return have, state


def order_of(release: Release, core_parcel: bytes, lines: list[str]) -> AgentUpdate:
    folder, _, name = release.path.rpartition("/")
    return AgentUpdate(
        "r-1",
        f"/v1/targets/{folder}/{release.sha256}.{name}",
        hashlib.sha384(release.archive).hexdigest(),
        release.custom["version"],
        release.digest,
        release.path,
        hashlib.sha384(core_parcel).hexdigest(),
        lines,
    )


async def follow(connection: Recorded, within_s: float = 180.0) -> list[Message]:
    """What the node tells of its recovery, until its last word or until it goes away."""
    told: list[Message] = []
    async with asyncio.timeout(within_s):
        while (message := await connection.next(within_s)) is not None:
            if isinstance(message, (AgentUpdateProgress, AgentUpdateDownloaded, AgentUpdateEnded)):
                told.append(message)
            if isinstance(message, AgentUpdateEnded):
                break
    return told
