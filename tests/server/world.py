"""A real server in a process of its own, the keys of its operator, and a small node that talks to it.

The node is written from docs/protocol.md alone, so that a mistake in the shipped one cannot hide here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import sqlite3
import ssl
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from securesystemslib.signer import CryptoSigner

from instar.trust.manifest import FileEntry
from instar.trust.module import ModuleManifest
from instar_server.ca import FleetCA
from instar_server.main import initialise
from instar_server.settings import Layout, check
from instar_server.trust import keys, offline
from instar_server.trust.offline import RoleKeys
from instar_server.trust.pack import Release, pack_files, pack_recovery, pack_release

ROOT = Path(__file__).resolve().parents[2]
WITHIN_S = 60.0  # for whatever a busy machine may take long for
BASE = {"hosts": ["127.0.0.1", "localhost"], "bind": "127.0.0.1", "gateway_port": 0, "api_port": 0}


def later(days: float) -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)


def program(version: str, noise: int = 0) -> bytes:
    """A small zipapp, another one for each version, with so many bytes in it that cannot be made smaller."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("__main__.py"), f"print({version!r})\n" + "# filler\n" * 20_000)
        if noise:
            archive.writestr(zipfile.ZipInfo("noise"), random.Random(version).randbytes(noise))
    return file.getvalue()


@dataclass
class Operator:
    """Offline keys, and what they have signed so far. 2 of 3 keys for root and targets."""

    folder: Path
    root_keys: list[CryptoSigner] = field(default_factory=lambda: _signers(3))
    targets_keys: list[CryptoSigner] = field(default_factory=lambda: _signers(3))
    root: bytes = b""
    targets: bytes = b""
    releases: dict[str, Release] = field(default_factory=dict)
    cores: dict[str, Release] = field(default_factory=dict)
    modules: dict[tuple[str, str], Release] = field(default_factory=dict)

    def make_root(self) -> Path:
        online = keys.generate_online(self.folder / "online")
        roles = {
            "root": RoleKeys([s.public_key for s in self.root_keys], 2),
            "targets": RoleKeys([s.public_key for s in self.targets_keys], 2),
            "snapshot": RoleKeys([online["snapshot"]], 1),
            "timestamp": RoleKeys([online["timestamp"]], 1),
        }
        unsigned = offline.first_root(roles, later(365))
        self.root = unsigned
        for signer in self.root_keys[:2]:
            self.root = offline.sign(self.root, signer, [unsigned])
        path = self.folder / "root.json"
        path.write_bytes(self.root)
        return path

    def add(self, version: str, noise: int = 0) -> Release:
        """Sign targets metadata that has the release `version` too."""
        release = pack_release(program(version, noise), version)
        self._sign(release)
        self.releases[version] = release
        return release

    def add_module(self, name: str, version: str, mode: str) -> Release:
        """Sign targets metadata that has this module too."""
        code = f"def run(args, context):\n    return {{'version': {version!r}}}\n".encode()
        entry = FileEntry("module.py", len(code), hashlib.sha256(code).hexdigest(), "0644")
        manifest = ModuleManifest(name, version, "python", mode, {"any": "module.py"}, (entry,))
        release = pack_files(manifest, {"module.py": code})
        self._sign(release)
        self.modules[name, version] = release
        return release

    def add_core(self, version: str) -> Release:
        """Sign targets metadata that has this recovery core too."""
        release = pack_recovery(program(f"core {version}"), version)
        self._sign(release)
        self.cores[version] = release
        return release

    def _sign(self, release: Release) -> None:
        current = self.targets or offline.first_targets(later(90))
        self.targets = offline.add_target(
            current, release.path, len(release.archive), release.sha256, release.custom, later(90)
        )
        for signer in self.targets_keys[:2]:
            self.targets = offline.sign(self.targets, signer, [self.root])


def _signers(count: int) -> list[CryptoSigner]:
    return [CryptoSigner.generate_ed25519() for _ in range(count)]


class World:
    """A server's folder and its process. `api()` is a client of the operators' port as admin."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.layout = Layout(folder / "data")
        self.operator = Operator(folder)
        self.admin = initialise(
            self.layout, check({**BASE, **settings}, "the test"), self.operator.make_root(), folder / "online"
        )
        self.process: subprocess.Popen[str] | None = None
        self.ports: dict[str, Any] = {}

    # ---- the process

    def start(self) -> None:
        path = os.pathsep.join(str(ROOT / part / "src") for part in ("node", "server"))
        self.log = (self.folder / "server.log").open("a")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "instar_server.main", "run", "--data", str(self.layout.data), "--verbose"],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "ready" in line, (self.folder / "server.log").read_text()
        self.ports = json.loads(self.layout.ports.read_text())

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> int:
        process = self.process
        assert process is not None
        assert process.stdout is not None
        process.send_signal(number)
        status = process.wait(WITHIN_S)
        process.stdout.close()
        self.log.close()
        self.process = None
        return status

    # ---- the operator

    def api(self, token: str | None = None) -> httpx.Client:
        context = ssl.create_default_context(cafile=str(self.layout.ca / "ca.pem"))
        headers = {"Authorization": f"Bearer {token or self.admin}"}
        base = f"https://127.0.0.1:{self.ports['api_port']}/api/v1"
        return httpx.Client(base_url=base, headers=headers, verify=context, timeout=WITHIN_S, trust_env=False)

    def publish(self, version: str, noise: int = 0) -> Release:
        release = self.operator.add(version, noise)
        self._upload(release)
        return release

    def publish_module(self, name: str, version: str = "1.0.0", mode: str = "oneshot") -> Release:
        release = self.operator.add_module(name, version, mode)
        self._upload(release)
        return release

    def publish_core(self, version: str) -> Release:
        release = self.operator.add_core(version)
        self._upload(release)
        return release

    def _upload(self, release: Release) -> None:
        with self.api() as api:
            api.put(f"/blobs/{release.sha256}", content=release.archive).raise_for_status()
            api.put("/trust/targets", content=self.operator.targets).raise_for_status()

    def access(self) -> dict[str, str]:
        """The environment of an `instarctl` that is this server's administrator, with no settings of anybody's."""
        return {
            "INSTARCTL_SERVER": self.ports["api"],
            "INSTARCTL_TOKEN_FILE": str(self.layout.admin_token),
            "INSTARCTL_CA": str(self.layout.ca / "ca.pem"),
            "INSTARCTL_CONFIG": str(self.folder / "no-such-file"),
        }

    def token(self, group: str = "default", uses: int = 1, lifetime_s: float = 3600.0) -> str:
        with self.api() as api:
            answer = api.post("/tokens", json={"group": group, "uses": uses, "lifetime_s": lifetime_s})
        answer.raise_for_status()
        return str(answer.json()["token"])

    def want(self, scope: str, subject: str, version: str, *lines: str, via: str = "pull") -> None:
        wanted = {"version": version, "lines": list(lines or ("agent",)), "via": via}
        body = {"scope": scope, "subject": subject, **wanted}
        with self.api() as api:
            api.put("/wishes", json=body).raise_for_status()

    def order(self, *nodes: Node, path: str = "/jobs", **body: Any) -> dict[str, Any]:
        """Order something for these nodes; a job with the module `echo` unless `body` says otherwise."""
        body = {"select": {"nodes": [node.id for node in nodes]}, **body}
        if path == "/jobs":
            body = {"module": "echo", **body}
        return self.ask("POST", path, json=body)

    def ask(self, method: str, path: str, status: int = 200, **more: Any) -> Any:
        """A call of the API that is answered with `status`."""
        with self.api() as api:
            answer = api.request(method, path, **more)
        assert answer.status_code == status, answer.text
        return answer.json()

    def history(self, id_: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("GET", f"/nodes/{id_}/history")["entries"]
        return found

    def node(self, id_: str) -> dict[str, Any]:
        with self.api() as api:
            answer = api.get(f"/nodes/{id_}")
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def new_node(self, group: str = "default", facts: dict[str, Any] | None = None) -> Node:
        """Enrol a node."""
        node = Node(self, self.folder / "nodes" / os.urandom(4).hex())
        answer = node.enrol(self.token(group), facts=facts)
        assert answer.status_code == 200, answer.text
        return node


@contextlib.contextmanager
def running(folder: Path, **settings: Any) -> Iterator[World]:
    """A world whose server runs until the block ends."""
    world = World(folder, **settings)
    world.start()
    try:
        yield world
    finally:
        if world.process is not None:
            world.kill()


def make_csr(key: Any) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def pem_of(key: Any) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


class Node:
    """Just enough of a node."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.id = ""
        folder.mkdir(parents=True)
        (folder / "key.pem").write_bytes(pem_of(self.key))

    @property
    def base(self) -> str:
        return f"https://127.0.0.1:{self.world.ports['gateway_port']}"

    def enrol(
        self, token: str, csr: str | None = None, facts: dict[str, Any] | None = None
    ) -> httpx.Response:
        context = ssl.create_default_context(cafile=str(self.world.layout.ca / "ca.pem"))
        body = {
            "v": 1, "token": token, "csr": make_csr(self.key) if csr is None else csr, "facts": facts or {"a": 1},
        }  # fmt: skip
        with httpx.Client(verify=context, timeout=WITHIN_S, trust_env=False) as client:
            answer = client.post(f"{self.base}/v1/enrol", json=body)
        if answer.status_code == 200:
            self.id = answer.json()["node"]
            (self.folder / "cert.pem").write_text(answer.json()["certificate"])
        return answer

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.world.layout.ca / "ca.pem"))
        context.load_cert_chain(self.folder / "cert.pem", self.folder / "key.pem")
        return context

    @property
    def serial(self) -> str:
        certificate = x509.load_pem_x509_certificate((self.folder / "cert.pem").read_bytes())
        text = f"{certificate.serial_number:X}"
        return text.zfill(len(text) + len(text) % 2)

    def lapse(self, days: float = 40.0) -> None:
        """Put in place a certificate that this server issued so long ago, and that has run out since."""
        issued = FleetCA.load(self.world.layout.ca).issue_node(
            self.id, self.key.public_key(), time.time() - days * 86400, (days - 1) * 86400
        )
        (self.folder / "cert.pem").write_text(issued.pem)
        with sqlite3.connect(self.world.layout.database, timeout=WITHIN_S) as database:
            row = (issued.serial, self.id, time.time() - days * 86400, issued.not_after)
            database.execute(
                "INSERT INTO certificates (serial, node, issued, not_after) VALUES (?,?,?,?)", row
            )

    def http(self, program: str = "") -> httpx.Client:
        headers = {"Instar-Program": program} if program else {}
        return httpx.Client(
            base_url=self.base, verify=self.context(), headers=headers, timeout=WITHIN_S, trust_env=False
        )

    @contextlib.asynccontextmanager
    async def channel(self) -> AsyncIterator[Channel]:
        """A control channel, without the hello."""
        connector = aiohttp.TCPConnector(ssl=self.context())
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.ws_connect(f"{self.base}/v1/channel", max_msg_size=0) as ws,
        ):
            yield Channel(self, ws)

    @contextlib.asynccontextmanager
    async def connected(
        self, version: str = "1.0.0", role: str = "agent", tx: str = "", digest: str = "", **more: Any
    ) -> AsyncIterator[Channel]:
        """A control channel that was welcomed."""
        async with self.channel() as channel:
            await channel.hello(version, role, tx, digest, **more)
            assert (await channel.read())["t"] == "welcome"
            yield channel


@dataclass
class Channel:
    """`jobs`: how often each has come, and which were taken: one is sent again until that is known."""

    node: Node
    ws: aiohttp.ClientWebSocketResponse
    jobs: Counter[str] = field(default_factory=Counter)
    taken: set[str] = field(default_factory=set)

    async def hello(
        self, version: str = "1.0.0", role: str = "agent", tx: str = "", digest: str = "", **more: Any
    ) -> None:
        release = self.node.world.operator.releases.get(version)
        digest = digest or (str(release.custom["program_digest"]) if release else "0" * 96)
        frame = {
            "v": 1, "role": role, "node": self.node.id, "version": version, "digest": digest,
            "boot_id": "b", "pid": 1, "started": time.time(), "tx": tx, "os": "test", "features": ["x"],
        }  # fmt: skip
        await self.send("hello", **{**frame, **more})

    async def send(self, type_: str, **fields: Any) -> None:
        await self.ws.send_json({"t": type_, **fields})

    async def read(self, within_s: float = WITHIN_S) -> dict[str, Any]:
        """The next frame; {'t': 'closed'} when the server closed."""
        frame = await self.ws.receive(within_s)
        if frame.type is not aiohttp.WSMsgType.TEXT:
            return {"t": "closed"}
        found: dict[str, Any] = json.loads(frame.data)
        if found["t"] == "job":
            self.jobs[found["id"]] += 1
        return found

    async def read_type(self, type_: str, within_s: float = WITHIN_S) -> dict[str, Any]:
        """The next frame of a type; looks, and jobs that have come before, may come in between."""
        while True:
            frame = await self.read(within_s)
            passed = frame["t"] == "look" or (frame["t"] == "job" and self.jobs[frame["id"]] > 1)
            if frame["t"] == type_ or not passed:
                assert frame["t"] == type_, frame
                return frame

    async def job(self, within_s: float = WITHIN_S) -> dict[str, Any]:
        """The next job that was not taken yet, taken."""
        while (job := await self.read_type("job", within_s))["id"] in self.taken:
            pass
        self.taken.add(job["id"])
        await self.send("taken", id=job["id"])
        return job

    async def answer(self, job: dict[str, Any], **more: Any) -> None:
        """A result, acknowledged."""
        await self.send("result", id=job["id"], **({"ok": True, "reply": {"echo": job["args"]}} | more))
        assert (await self.read_type("ack"))["id"] == job["id"]

    async def answer_all(self) -> None:
        """Until cancelled, do every job and command as a good node does."""
        while (frame := await self.read())["t"] != "closed":
            if frame["t"] == "job":
                await self.send("taken", id=frame["id"])
                await self.send("output", id=frame["id"], seq=1, kind="log", text="at work")
                await self.send("result", id=frame["id"], ok=True, reply={"echo": frame["args"]}, seconds=0.5)
            elif frame["t"] == "command":
                await self.send("taken", id=frame["id"])
                told = {"id": frame["id"], "type": frame["type"], "status": "success"}
                await self.send("command-status", **told, modules=dict.fromkeys(frame["modules"], "running"))

    async def selftest(self, job: dict[str, Any], version: str = "1.0.0", /, **wrong: Any) -> None:
        """Answer a job as a good release does, except for what `wrong` says."""
        digest = self.node.world.operator.releases[version].custom["program_digest"]
        nonce = job["args"]["nonce"]
        answer = hashlib.sha256(f"{nonce}:{digest}:{version}".encode()).hexdigest()
        reply = {"nonce": nonce, "answer": answer, "version": version, "digest": digest, **wrong}
        await self.send("result", id=job["id"], ok=True, reply=reply)
