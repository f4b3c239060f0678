"""A real updater in a process of its own, with a fleet's certificates and a server that is never there."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from instar.core.releases import Release
from instar.host.files import make_folder, point_link, write_atomic
from instar.host.identity import Node, write_node
from instar.host.layout import LINES, Layout
from instar.host.line import MANIFEST, PROGRAM, Line
from instar.trust.manifest import FileEntry, Manifest
from instar.updater.http import openapi
from instar_lab import machine
from instar_lab.program import build
from instar_server.ca import FleetCA

NODE = "n-0123456789abcdef"
READY_S, STOP_S = 60.0, 10.0
MIB = 1 << 20
PASSING_S = 60.0
GAP = "127.0.0.1:9"  # where nobody listens


@cache
def program() -> build.Program:
    return build.build("1.0.0")


_kept: list[socket.socket] = []  # never listening, to the end of this process


def free_port() -> int:
    """A port that nobody listens on, and that the kernel gives to nobody else meanwhile: whoever asks for it by its
    number, with SO_REUSEADDR as a server does, has it."""
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    _kept.append(kept)
    return int(kept.getsockname()[1])


class Papers:
    """A fleet's CA, and what it gives out. `write` returns the paths of certificate and key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.authority = FleetCA.create(folder / "ca", time.time())
        self.ca = folder / "ca" / "ca.pem"

    def operator(self, name: str = "ada", lifetime_s: float = 3600.0, now: float = 0.0) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        at = now or time.time()
        issued = self.authority.issue_operator(name, key.public_key(), at, lifetime_s)
        return self.write(f"operator-{name}", issued.pem, key)

    def node(self, name: str = NODE) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        issued = self.authority.issue_node(name, key.public_key(), time.time(), 3600.0)
        return self.write(f"node-{name}", issued.pem, key)

    def write(self, name: str, pem: str, key: ec.EllipticCurvePrivateKey) -> tuple[Path, Path]:
        paths = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        paths[0].write_text(pem)
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return paths


def context(ca: Path, papers: tuple[Path, Path] | None) -> ssl.SSLContext:
    """As a client that looks for no host name: the node's certificate has none."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.load_verify_locations(str(ca))
    if papers:
        made.load_cert_chain(*(str(path) for path in papers))
    return made


class LocalConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float = PASSING_S) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Host:
    """The node's state folder and its updater."""

    def __init__(self, folder: Path, more: str = "") -> None:
        self.folder, self.port = folder, free_port()
        self.layout = Layout(folder / "s")
        self.papers = Papers(folder / "p")
        self.operator = self.papers.operator()
        self.log = folder / "updater.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._install(more)

    def _install(self, more: str) -> None:
        layout = self.layout
        for path in (layout.identity, layout.journal, layout.staging, layout.run, layout.launcher.parent):
            make_folder(path, 0o700)
        certificate, key = self.papers.node()
        shutil.copy(certificate, layout.certificate)
        shutil.copy(key, layout.key)
        shutil.copy(self.papers.ca, layout.ca)
        write_atomic(layout.launcher, program().data, 0o755)
        for role in LINES:
            install_release(Line(layout.line(role)), program())
        (layout.state / "service.json").write_text('{"v": 1, "manager": "none"}')
        layout.config.write_text(f'[updater]\napi = "127.0.0.1:{self.port}"\nretry_cap_s = 1.0\n{more}')
        write_node(layout, Node(NODE, f"https://{GAP}", "default", time.time()))

    # --- the process

    def words(self) -> list[str]:
        return [sys.executable, "-I", "-S", str(self.layout.launcher), "launch", "updater",
                "--state", str(self.layout.state)]  # fmt: skip

    def start(self, words: list[str] | None = None, **options: Any) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                words or self.words(), stderr=log, stdin=subprocess.DEVNULL, **options
            )
        wait_for(lambda: self.answers(), READY_S, self.log)

    def answers(self) -> bool:
        try:
            return bool(self.local("GET", "/v1/health")[0] == 200)
        except OSError:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            return False

    def close(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def memory(self, name: str) -> int:
        """VmHWM or VmRSS of the updater, in bytes."""
        assert self.process is not None
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith(name)).split()[1]) * 1024

    # --- callers

    def connection(self, papers: tuple[Path, Path] | None = None) -> http.client.HTTPSConnection:
        made = context(self.papers.ca, papers or self.operator)
        return http.client.HTTPSConnection("127.0.0.1", self.port, context=made, timeout=PASSING_S)

    def raw(self, papers: tuple[Path, Path] | None = None) -> ssl.SSLSocket:
        made = context(self.papers.ca, papers or self.operator)
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=PASSING_S)
        return made.wrap_socket(plain, server_hostname=None)

    def remote(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        with contextlib.closing(self.connection()) as connection:
            return ask(connection, method, path, **options)

    def local(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        with contextlib.closing(LocalConnection(self.layout.socket("updater"))) as connection:
            return ask(connection, method, path, **options)

    def left_over(self) -> list[str]:
        """What lies in `incoming`."""
        folder = self.layout.incoming
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: Any = None, **fields: str
) -> tuple[int, Any]:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.request(method, path, data, {name.replace("_", "-"): value for name, value in fields.items()})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def wait_for(true: Callable[[], Any], within_s: float, log: Path) -> Any:
    end = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    return found


def install_release(line: Line, built: build.Program) -> Release:
    release = Release(built.version, built.digest)
    entry = FileEntry(PROGRAM, len(built.data), hashlib.sha256(built.data).hexdigest(), "0755")
    folder = line.folder(release.name)
    make_folder(folder)
    write_atomic(folder / PROGRAM, built.data, 0o555)
    write_atomic(folder / MANIFEST, Manifest("instar", built.version, built.digest, (entry,)).encode(), 0o444)
    line.mark_valid(release.name)
    point_link(line.layout.current, f"releases/{release.name}")
    return release


class Parcel:
    """A parcel of `length` bytes of archive, made block by block: whoever sends it holds none of it."""

    def __init__(self, length: int, version: str = "1.1.0", kind: str = "node", digest: str = "") -> None:
        self._block = os.urandom(1 << 16)
        self._length = length
        sha256 = hashlib.sha256()
        for block in self._archive():
            sha256.update(block)
        record = {
            "format": 1, "kind": kind, "version": version, "digest": digest or "ab" * 48,
            "target": f"{kind}/instar-{version}.tar.gz", "length": length, "sha256": sha256.hexdigest(),
        }  # fmt: skip
        metadata = ("1.root", "timestamp", "1.snapshot", "1.targets")
        files = [("parcel.json", json.dumps(record).encode())]
        files += [(f"metadata/{name}.json", b"{}") for name in metadata]
        self._start = b"".join(_header(name, len(data)) + _padded(data) for name, data in files)
        self._start += _header("archive", length)
        self._end = bytes(-length % 512) + bytes(1024)
        self.length = len(self._start) + length + len(self._end)
        digest384 = hashlib.sha384()
        for block in self.blocks():
            digest384.update(block)
        self.sha384 = digest384.hexdigest()

    def _archive(self) -> Iterator[bytes]:
        for at in range(0, self._length, len(self._block)):
            yield self._block[: self._length - at]

    def blocks(self) -> Iterator[bytes]:
        yield self._start
        yield from self._archive()
        yield self._end

    @property
    def data(self) -> bytes:
        return b"".join(self.blocks())

    def fields(self, **other: str) -> dict[str, str]:
        return {"Content-Length": str(self.length), "Instar-SHA384": self.sha384, **other}


def _header(name: str, size: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size = 0
        tar.addfile(info)
        info.size = size
        return info.tobuf(tarfile.USTAR_FORMAT)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


@contextlib.contextmanager
def hosted(more: str = "") -> Iterator[Host]:
    folder = Path(tempfile.mkdtemp(prefix="ih-", dir="/tmp"))
    host = Host(folder, more)
    try:
        yield host
    finally:
        host.close()
        machine.end_all_naming(folder, grace_s=0.5)  # a way back starts a keeper, and that an agent
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with hosted() as made:
        made.start()
        yield made


@pytest.fixture
def quiet(host: Host) -> Host:
    """Nothing under way, and nothing in `incoming`."""
    wait_for(lambda: not host.local("GET", "/v1/health")[1]["transaction"], PASSING_S, host.log)
    shutil.rmtree(host.layout.incoming, ignore_errors=True)
    return host


def check(schema: dict[str, Any], value: Any) -> None:
    jsonschema_rs.validate({**schema, "components": {"schemas": openapi.SCHEMAS}}, value)
