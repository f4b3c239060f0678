"""The metadata calls of the real gateway, over mTLS, and the built program that makes them."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from instar.core.errors import ServerRefused
from instar.host.layout import Layout
from instar.oneshot.identity import make_key_and_csr
from instar_lab.program.build import build
from instar_server.ca import FleetCA, check_csr
from tests.trust.world import World

NODE = "n-0123456789abcdef"


class Gateway(ThreadingHTTPServer):
    """The metadata calls of the real gateway. `world.fetch` decides what comes."""

    daemon_threads = True
    world: World
    headers_seen: list[str]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gateway

    def do_GET(self) -> None:
        self.server.headers_seen.append(self.headers.get("Instar-Program", ""))
        try:
            status, body = 200, self.server.world.fetch(self.path.removeprefix("/v1/"))
        except ServerRefused as error:
            status, body = 404, json.dumps({"error": {"code": "no-metadata", "message": error.text}}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="session")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "instar.pyz"
    path.write_bytes(build("1.0.0").data)
    return path


def server_context(ca: FleetCA, pair: Path) -> ssl.SSLContext:
    """For a server on the loopback that lets in nobody without a certificate of `ca`; `pair` is written."""
    certificate, key = ca.issue_server(["127.0.0.1"], time.time())
    pair.write_text(certificate + key.decode())
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=ca.pem)
    context.load_cert_chain(pair)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def enrol(ca: FleetCA, layout: Layout, url: str) -> None:
    """Put a node's identity where the node looks for it; its server is at `url`."""
    key, csr = make_key_and_csr(NODE)
    issued = ca.issue_node(NODE, check_csr(csr.decode()), time.time(), 3600)
    layout.identity.mkdir(parents=True)
    layout.key.write_bytes(key)
    layout.certificate.write_text(issued.pem)
    layout.ca.write_text(ca.pem)
    layout.node.write_text(json.dumps({"v": 1, "node": NODE, "server": url}))


@pytest.fixture
def gateway(world: World) -> Iterator[Gateway]:
    ca = FleetCA.create(world.folder / "ca", time.time())
    context = server_context(ca, world.folder / "server.pem")
    gateway = Gateway(("127.0.0.1", 0), Handler)
    gateway.world, gateway.headers_seen = world, []
    gateway.socket = context.wrap_socket(gateway.socket, server_side=True)
    thread = threading.Thread(target=gateway.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    enrol(ca, Layout(world.trust.parent), f"https://127.0.0.1:{gateway.server_address[1]}")
    yield gateway
    gateway.shutdown()
    thread.join(10)
    gateway.server_close()
