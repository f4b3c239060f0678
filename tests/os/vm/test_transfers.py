"""Bundles from somebody else's server, who alters a byte, or breaks off: nothing but what was signed is started."""

from __future__ import annotations

import http.server
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from instar_lab.osimage.vm import HOST
from tests.os.vm import oracles
from tests.os.vm.falls import starts_from_a
from tests.os.vm.world import Machine, World, X, Y

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("vm-x")]

HEAD = 14  # bytes before the manifest; the last four are its length
Change = Callable[[bytes], bytes]  # bytes of frames -> those that are sent


class Mirror(http.server.ThreadingHTTPServer):
    """Serves one file by ranges, over TLS, with the fleet's own certificate. `sent` are bytes of bodies."""

    daemon_threads = True

    def __init__(self, file: Path, certificate: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.name, self.sent = file.read_bytes(), file.name, 0
        self.frames = HEAD + int.from_bytes(self.data[HEAD - 4 : HEAD], "big")
        self.change: Change = lambda data: data
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"https://{HOST}:{self.server_port}/{self.name}"

    def handle_error(self, *_: Any) -> None:
        return  # whoever asked is gone


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Mirror

    def do_GET(self) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
        assert match is not None
        whole = len(self.server.data)
        start = int(match[1])
        stop = min(whole, int(match[2]) + 1 if match[2] else whole)
        body = self.server.data[start:stop]
        if start >= self.server.frames:
            body = self.server.change(body)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{whole}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(body)
        self.server.sent += len(body)
        if len(body) < stop - start:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def mirror(world: World) -> Iterator[Mirror]:
    y = world.image(Y)
    world.publish(y)
    file = world.folder / f"lab-{Y}.bundle"
    file.write_bytes(y.bundle.read_bytes())
    made = Mirror(file, world.server.layout.certificate)
    yield made
    made.shutdown()
    made.server_close()


def altered(data: bytes) -> bytes:
    """One bit."""
    return data[:-1] + bytes((data[-1] ^ 1,))


class Truncated:
    """Streams of frames end early, `left` times."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, data: bytes) -> bytes:
        if not self.left:
            return data
        self.left -= 1
        return data[: len(data) // 2]


def test_a_flipped_bit_is_refused_and_a_stream_that_breaks_off_gone_on_with(
    on_x: Machine, world: World, mirror: Mirror
) -> None:
    machine, y = on_x, world.image(Y)
    mirror.change = altered
    ended = machine.ended(machine.update_os(mirror.url, "reboot"))
    assert (ended["outcome"], ended["code"]) == ("unavailable", "altered-chunk"), ended
    system = machine.reported(lambda seen: not seen["update"], "a node that is done with it")
    assert (system["running"], system["slots"]["b"]["state"]) == ("a", "writing"), system
    assert mirror.sent > 0
    starts_from_a(machine, world.image(X))
    assert "EFI/instar/b.efi" not in oracles.Esp(machine.disk).files()

    mirror.change = truncated = Truncated(3)
    ended = machine.ended(machine.update_os(mirror.url, "none"))
    assert (ended["outcome"], truncated.left) == ("installed, not active", 0), ended
    assert any(entry["reason_code"] == "cut-off" for entry in machine.history()), machine.history()
    starts_from_a(machine, world.image(X), kernel_b=Y)
    assert oracles.Esp(machine.disk).read("EFI/instar/b.efi") == y.kernel.read_bytes()
    assert oracles.holds(machine.disk, "b", y.root)
    assert machine.versions() == []
