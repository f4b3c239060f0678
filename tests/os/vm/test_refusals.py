"""What is refused, by the server or by the node itself, writes nothing: slots, partition and variables stay as they
are."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from instar.core.errors import ServerUnreachable
from instar_lab.machine import wait_for
from instar_lab.osimage import variant
from tests.node.tls_server import TlsServer, answer
from tests.os.vm import relabelled
from tests.os.vm.falls import starts_from_a
from tests.os.vm.untouched import untouched
from tests.os.vm.world import HOST, Machine, World, X, Y, Z

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("vm-x")]

OLDER = "0.8.0"  # than a node takes
WAIT_S = 120.0
# Runs in the guest: a call of the updater's own API.
CALL = """\
import json, socket
method, path, body = json.loads('''{}''')
data = json.dumps(body).encode()
with socket.socket(socket.AF_UNIX) as connection:
    connection.settimeout(60)
    connection.connect("/data/instar/run/updater.sock")
    head = f"{{method}} {{path}} HTTP/1.1\\r\\nHost: node\\r\\nContent-Type: application/json\\r\\n"
    connection.sendall(f"{{head}}Content-Length: {{len(data)}}\\r\\nConnection: close\\r\\n\\r\\n".encode() + data)
    said = b""
    while more := connection.recv(65536):
        said += more
head, _, body = said.partition(b"\\r\\n\\r\\n")
print(head.split()[1].decode(), body.decode())
"""


class Chain(NamedTuple):
    """A certificate of the fleet's, with its key."""

    chain: Path


class Elsewhere(TlsServer):
    """Serves one file by ranges under any name, once `go` is set."""

    def __init__(self, certificate: Path, file: Path) -> None:
        self._data, self.go, self.asked = file.read_bytes(), threading.Event(), threading.Event()
        super().__init__(Chain(certificate), self._serve)  # type: ignore[arg-type]

    def _serve(self, line: str, headers: dict[str, str], secure: ssl.SSLSocket) -> bool:
        self.asked.set()
        if not self.go.wait(WAIT_S):
            return False
        first, _, last = headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
        data = self._data[int(first) : int(last) + 1 if last else None]
        return answer(secure, data, "206 Partial Content" if "range" in headers else "200 OK")


@pytest.fixture
def elsewhere(world: World) -> Iterator[Elsewhere]:
    """Another place, where another bundle has the name of the published one."""
    made = Elsewhere(world.server.layout.certificate, world.image(Z).bundle)
    yield made
    made.go.set()
    made.close()


def test_nothing_is_written(on_x: Machine, world: World, elsewhere: Elsewhere) -> None:
    machine = on_x
    with untouched(machine):
        what_the_server_knows(machine, world)
    with untouched(machine):
        what_the_node_finds_out(machine, world)
    with untouched(machine):
        a_second_one(machine, world, elsewhere)
    with untouched(machine):
        what_is_asked_of_the_node_itself(machine)
    starts_from_a(machine, world.image(X))
    assert machine.versions() == []


def what_the_server_knows(machine: Machine, world: World) -> None:
    y, before = world.image(Y), machine.system()["updates"]
    bundle = world.publish(y)
    assert machine.refused(bundle, None) == "invalid-argument"
    assert machine.refused(bundle, "later") == "invalid-argument"
    assert machine.refused("lab", "reboot") == "invalid-argument"
    assert machine.refused("lab-9.9.9", "reboot") == "not-found"
    other = relabelled.publish(world, y, name="other", compatible=("another-board",))
    assert machine.refused(other, "reboot") == "failed-precondition"
    newer = relabelled.publish(world, y, name="newer", min_version="9.0.0")
    assert machine.refused(newer, "kexec") == "failed-precondition"
    forged = relabelled.publish(world, y, {"digest": "0" * 96}, name="forged")
    with pytest.raises(ServerUnreachable, match="altered-bundle"):
        machine.refused(forged, "reboot")
    assert machine.system()["updates"] == before


def what_the_node_finds_out(machine: Machine, world: World) -> None:
    """Its own settings; and a manifest that is for other hardware than its signed target says."""
    older = relabelled.publish(world, world.image(Y), name="older", version=OLDER)
    signed = {"compatible": [variant.HARDWARE]}
    lying = relabelled.publish(world, world.image(Y), signed, name="lying", compatible=("another-board",))
    for bundle, code in ((older, "too-old-bundle"), (lying, "wrong-hardware")):
        ended = machine.ended(machine.update_os(bundle, "reboot"))
        assert (ended["outcome"], ended["code"]) == ("failed-precondition", code), ended
        told = [entry for entry in machine.history() if entry["line"] == "os"]
        assert told[-1]["phase"] == "reverted", told[-1]
        assert code in {entry["reason_code"] for entry in told}, told


def a_second_one(machine: Machine, world: World, elsewhere: Elsewhere) -> None:
    """While one waits for its bytes; which then are those of another bundle than was signed."""
    bundle = world.publish(world.image(Y))
    order = machine.update_os(f"https://{HOST}:{elsewhere.port}/x/{bundle}.bundle", "reboot")
    assert elsewhere.asked.wait(WAIT_S), machine.words()
    for each in (bundle, f"older-{OLDER}"):
        assert machine.refused(each, "kexec") == "aborted"
        assert asked(machine, {"bundle": each, "activation": "kexec"}) == (409, "aborted")
    elsewhere.go.set()
    ended = machine.ended(order)
    assert (ended["outcome"], ended["code"]) == ("unavailable", "altered-bundle"), ended
    assert [each["id"] for each in machine.system()["updates"]].count(order["id"]) == 1


def what_is_asked_of_the_node_itself(machine: Machine) -> None:
    bundle = f"{variant.NAME}-{Y}"
    good = {"bundle": bundle, "activation": "reboot"}
    assert asked(machine, {"bundle": bundle}) == (400, "invalid-argument")
    assert asked(machine, {**good, "activation": "later"}) == (400, "invalid-argument")
    assert asked(machine, {**good, "bundle": "lab-9.9.9"}) == (404, "not-found")
    assert asked(machine, {**good, "bundle": f"other-{Y}"}) == (412, "failed-precondition")
    for name, code in (
        (f"newer-{Y}", "too-old-system"), (f"older-{OLDER}", "too-old-bundle"), (f"lying-{Y}", "wrong-hardware"),
        (f"forged-{Y}", "altered-bundle"),
    ):  # fmt: skip
        assert comes_to(machine, name) == code, name


def comes_to(machine: Machine, bundle: str) -> str:
    """Why an update ends that was ordered on the node."""
    status, body = call(machine, "POST", "/v1/update-os", {"bundle": bundle, "activation": "reboot"})
    assert status == 202, body
    found: list[str] = []

    def ended() -> bool:
        _, shown = call(machine, "GET", f"/v1/transactions/{body['tx']}")
        found[:] = [shown["reason"]["code"]] if shown["state"] == "reverted" else []
        return bool(found)

    wait_for(ended, f"an end of {bundle}", WAIT_S, machine.words, every_s=0.5)
    return found[0]


def asked(machine: Machine, body: dict[str, Any]) -> tuple[int, str]:
    status, said = call(machine, "POST", "/v1/update-os", body)
    return status, said.get("error", said).get("code", "")


def call(machine: Machine, method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
    words = json.dumps([method, path, body or {}])
    said = machine.do(f"python3 -I -S - <<'END'\n{CALL.format(words)}END\n", 90.0)
    status, _, rest = said.partition(" ")
    return int(status), json.loads(rest)
