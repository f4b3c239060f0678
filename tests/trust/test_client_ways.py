"""updater.client: metadata and targets from another port than the rest, and a program that was damaged meanwhile."""

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

from instar.core.errors import MachineError, ServerRefused, ServerUnreachable
from instar.engine.fetch import Limits, fetch
from instar.host.layout import Layout
from instar.host.program import Program
from instar.host.records import read_artifacts
from instar.host.transport import Endpoint, Transport
from instar.trust.program import program_digest
from instar.updater.client import ARTIFACTS, ServerClient
from instar_lab.program.build import build
from instar_server.ca import FleetCA
from tests.trust.gateway import enrol, server_context
from tests.trust.world import PATH, World


class Port(ThreadingHTTPServer):
    """One port of the server: metadata and targets if `world` is set, else what is wanted."""

    daemon_threads = True
    world: World | None = None
    artifacts = ""
    cut_after = -1  # bytes of a target

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        if self.thread.is_alive():
            self.shutdown()
            self.thread.join(10)
            self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Port

    def do_GET(self) -> None:
        port = self.server
        port.asked.append(self.path)
        status, body, length = 200, b"", -1
        if port.world is None:
            if self.path.startswith("/v1/node/wanted"):
                body = json.dumps({"v": 1, "lines": {}, "artifacts": port.artifacts}).encode()
            else:
                status, body = 404, b"{}"
        elif self.path.startswith("/v1/metadata/"):
            try:
                body = port.world.fetch(self.path.removeprefix("/v1/"))
            except ServerRefused:
                status = 404
        else:
            found = port.world.repository.target_file(self.path.removeprefix("/v1/targets/"))
            assert found is not None
            body = found.read_bytes()
            length = len(body)
            body = body if port.cut_after < 0 else body[: port.cut_after]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        self.wfile.write(body)
        if 0 <= len(body) < length:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class Fleet:
    """A node, the port that it knows, and the port of the artifacts."""

    def __init__(self, world: World) -> None:
        self.world, self.layout = world, Layout(world.trust.parent)
        ca = FleetCA.create(world.folder / "ca", time.time())
        context = server_context(ca, world.folder / "server.pem")
        self.main, self.artifacts = Port(context), Port(context)
        self.artifacts.world, self.main.artifacts = world, self.artifacts.url
        for folder in (self.layout.run, self.layout.launcher.parent):
            folder.mkdir(parents=True)
        enrol(ca, self.layout, self.main.url)
        self.built = build("1.0.0").data
        self.layout.launcher.write_bytes(self.built)
        self.own = world.folder / "own.pyz"
        self.own.write_bytes(self.built)
        program = Program("1.0.0", program_digest(self.built), self.own, "")
        layout = self.layout
        endpoint = Endpoint(
            self.main.url, layout.ca, layout.certificate, layout.key, "", program.header("updater"), 60.0
        )
        self.client = ServerClient(Transport(endpoint), layout, program)

    def fetch(self, into: Path) -> None:
        target = self.client.trusted_target(PATH)
        limits = Limits(tries=2, retry_floor_s=0.01, retry_cap_s=0.02)
        fetch(self.client.source(), target.path, into, target.length, limits)


@pytest.fixture
def fleet(world: World) -> Iterator[Fleet]:
    made = Fleet(world)
    yield made
    made.main.close()
    made.artifacts.close()


def test_metadata_and_targets_come_from_where_the_server_says(fleet: Fleet, tmp_path: Path) -> None:
    assert fleet.client.wanted().artifacts == fleet.artifacts.url
    fleet.fetch(tmp_path / "archive")
    assert (tmp_path / "archive").stat().st_size == fleet.world.repository.targets()[0].length
    assert fleet.main.asked == ["/v1/node/wanted"]
    assert any(path.startswith("/v1/targets/") for path in fleet.artifacts.asked)
    assert read_artifacts(fleet.layout) == fleet.artifacts.url
    fleet.main.artifacts = ""
    fleet.client.wanted()
    assert read_artifacts(fleet.layout) == ""
    assert fleet.client.source().endpoint.server == fleet.main.url


def test_artifacts_that_cannot_be_reached_have_a_code_of_their_own(fleet: Fleet, tmp_path: Path) -> None:
    fleet.client.wanted()
    fleet.artifacts.cut_after = 10
    with pytest.raises(ServerUnreachable) as caught:
        fleet.fetch(tmp_path / "archive")
    assert caught.value.code == ARTIFACTS
    fleet.artifacts.close()
    with pytest.raises(ServerUnreachable) as caught:
        fleet.client.trusted_target(PATH)
    assert caught.value.code == ARTIFACTS
    assert fleet.client.wanted(ARTIFACTS).wishes == ()
    assert fleet.main.asked[-1] == f"/v1/node/wanted?trouble={ARTIFACTS}"


def test_where_there_is_one_port_only_it_is_the_server_that_is_away(fleet: Fleet) -> None:
    fleet.main.artifacts = ""
    fleet.client.wanted()
    fleet.main.close()
    with pytest.raises(ServerUnreachable) as caught:
        fleet.client.trusted_target(PATH)
    assert caught.value.code == "server-unreachable"


def test_a_parcels_metadata_need_no_server(fleet: Fleet, tmp_path: Path) -> None:
    fleet.client.wanted()
    fleet.main.close()
    fleet.artifacts.close()
    folder = tmp_path / "metadata"
    folder.mkdir()
    for name, data in fleet.world.served().items():
        (folder / name).write_bytes(data)
    found = fleet.client.trusted_target(PATH, folder)
    assert found.sha256 == fleet.world.repository.targets()[0].sha256
    (folder / "timestamp.json").unlink()
    with pytest.raises(ServerUnreachable) as caught:
        fleet.client.trusted_target(PATH, folder)
    assert caught.value.code != ARTIFACTS, "the server cannot help with that"


@pytest.mark.parametrize("damage", ["zeros", "gone"])
def test_a_program_that_was_damaged_is_not_asked_to_verify(fleet: Fleet, damage: str) -> None:
    fleet.client.wanted()
    if damage == "zeros":
        fleet.own.write_bytes(bytes(len(fleet.built)))
    else:
        fleet.own.unlink()
    assert fleet.client.trusted_target(PATH).length > 0
    fleet.layout.launcher.write_bytes(b"nothing")
    with pytest.raises(MachineError):
        fleet.client.trusted_target(PATH)
