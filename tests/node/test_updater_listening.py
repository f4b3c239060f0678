"""The updater's API under clients that are slow or many, and where it listens. Real sockets, real TLS."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from instar.core.errors import InputError, MachineError
from instar.core.settings import read_settings
from instar.updater.http.connection import Body, Connection, Pace
from instar.updater.http.listener import Listener
from tests.node import updater_host
from tests.node.updater_host import (
    PASSING_S,
    Host,
    LocalConnection,
    ask,
    context,
    host,
    hosted,
    quiet,
)

__all__ = ["host", "quiet"]  # fixtures

ASK = b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n"


# --- clients that are slow, or many


def test_slow_clients_are_cut_off_and_keep_nobody_waiting(host: Host) -> None:
    ended: dict[str, float] = {}
    began = time.monotonic()

    def silent() -> None:
        with socket.create_connection(("127.0.0.1", host.port), timeout=PASSING_S) as plain:
            plain.recv(1)
        ended["no handshake"] = time.monotonic() - began

    def dribble() -> None:
        with contextlib.closing(host.raw()) as secure:
            secure.settimeout(0.3)
            for byte in b"GET /v1/health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 100:
                secure.sendall(bytes((byte,)))
                with contextlib.suppress(TimeoutError):
                    said = secure.recv(1000)
                    ended["no head"] = time.monotonic() - began
                    assert b" 408 " in said
                    assert b'"too-slow"' in said
                    return

    threads = [threading.Thread(target=each) for each in (silent, dribble)]
    for thread in threads:
        thread.start()
    meanwhile = 0
    while any(thread.is_alive() for thread in threads):
        assert host.remote("GET", "/v1/health")[0] == 200
        meanwhile += not ended
        time.sleep(0.5)
    assert meanwhile, "it was answered only when they were cut off"
    assert ended["no handshake"] > 4.0
    assert ended["no head"] > 9.0


def test_a_body_must_come_on() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(bytes(150))
        body = Body(Connection(ours), 1000, Pace(stall_s=2.0, stall_bytes=100, whole_s=60.0))
        assert len(body.read(1000)) == 150
        theirs.sendall(bytes(99))
        assert len(body.read(1000)) == 99
        with pytest.raises(InputError) as stalled:
            body.read(1000)
        assert stalled.value.code == "too-slow"
        whole = Body(Connection(ours), 1000, Pace(stall_s=60.0, stall_bytes=1, whole_s=0.2))
        with pytest.raises(InputError) as late:
            whole.read(1000)
        assert late.value.code == "too-slow"


def test_strangers_keep_no_operator_out(host: Host) -> None:
    """From the same address, and more than there are places: who came first has to go."""
    no_operator = context(host.papers.ca, host.papers.node("n-00000000000000aa"))
    with contextlib.ExitStack() as stack:

        def plain() -> socket.socket:
            made = socket.create_connection(("127.0.0.1", host.port), timeout=PASSING_S)
            return stack.enter_context(contextlib.closing(made))

        operator = stack.enter_context(contextlib.closing(host.raw()))
        operator.sendall(ASK)
        assert operator.recv(100_000).startswith(b"HTTP/1.1 200 OK")  # so its certificate was looked at
        silent = [plain() for _ in range(6)]
        waiting = [
            stack.enter_context(contextlib.closing(no_operator.wrap_socket(plain()))) for _ in range(6)
        ]
        began = time.monotonic()
        assert host.remote("GET", "/v1/health")[0] == 200
        assert time.monotonic() - began < 4.0
        assert silent[0].recv(1) == b""
        assert host.local("GET", "/v1/health")[0] == 200
        operator.sendall(ASK)  # one that was there before them
        assert operator.recv(100_000).startswith(b"HTTP/1.1 200 OK")
        assert waiting


def test_a_node_is_told_that_it_is_no_operator_before_it_asks(host: Host) -> None:
    began = time.monotonic()
    with contextlib.closing(host.raw(host.papers.node("n-00000000000000aa"))) as secure:
        said = b"".join(iter(lambda: secure.recv(65_536), b""))
        assert said.startswith(b"HTTP/1.1 403 ")
        assert b"not-an-operator" in said
    assert time.monotonic() - began < 9.0


def test_operators_have_places_of_their_own(host: Host) -> None:
    with contextlib.ExitStack() as stack:

        def served() -> ssl.SSLSocket | None:
            """One more place; None while the one of an earlier caller, who has left, is not free yet."""
            made = stack.enter_context(contextlib.closing(host.raw()))
            made.sendall(ASK)
            return made if made.recv(100).startswith(b"HTTP/1.1 200 OK") else None

        kept = [updater_host.wait_for(served, PASSING_S, host.log) for _ in range(16)]
        status, body = host.remote("GET", "/v1/health")
        assert (status, body["error"]["code"]) == (503, "no-place")
        assert host.local("GET", "/v1/health")[0] == 200
        kept.pop().close()
        updater_host.wait_for(lambda: answers_remotely(host), PASSING_S, host.log)


def test_a_stranger_does_not_keep_the_updater_from_leaving(tmp_path: Path) -> None:
    operator, came, done = threading.Event(), threading.Event(), threading.Event()
    refused: list[str] = []

    def serve(connection: socket.socket, address: str, admit: Callable[[], None]) -> None:
        came.set()
        operator.wait(PASSING_S)
        try:
            admit()
        except MachineError as error:
            refused.append(error.code)
        came.set()
        done.wait(PASSING_S)

    port = updater_host.free_port()
    listener = Listener(tmp_path / "s", f"127.0.0.1:{port}", lambda connection: None, serve)
    listener.start()
    with socket.create_connection(("127.0.0.1", port), timeout=PASSING_S):
        assert came.wait(PASSING_S)
        came.clear()
        assert listener.leave()
        listener.stay()
        operator.set()
        assert came.wait(PASSING_S)
        assert not refused
        assert not listener.leave()
        done.set()
        updater_host.wait_for(listener.leave, PASSING_S, tmp_path)
        listener.stay()


def answers_remotely(host: Host) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return host.remote("GET", "/v1/health")[0] == 200
    return False


# --- the ports


def test_a_port_that_is_taken_is_said_once_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = threading.Event()

    def serve(*_: object) -> None:
        served.set()

    port = updater_host.free_port()
    with socket.create_server(("127.0.0.1", port)):
        listener = Listener(tmp_path / "s", f"127.0.0.1:{port}", serve, serve, retry_s=0.1)
        listener.start()  # which tries once itself
        time.sleep(0.5)
        assert [record.message for record in caplog.records].count(
            f"the API cannot listen on 127.0.0.1 port {port}: Address already in use; trying again"
        ) == 1
    end = time.monotonic() + PASSING_S
    while not served.is_set():
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), timeout=1.0) as plain,
        ):
            plain.recv(1)
        assert time.monotonic() < end
    assert listener.leave()
    listener.stay()


HANDING_IN = """
import os, socket, sys
state, port, words = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
local.bind(state + "/run/updater.sock"); local.listen(5)
over_tcp = socket.create_server(("127.0.0.1", port))
for number, each in ((3, over_tcp), (4, local)):
    os.dup2(os.dup(each.fileno()) if each.fileno() in (3, 4) else each.fileno(), number + 20)
for number in (3, 4):
    os.dup2(number + 20, number, inheritable=True)
os.environ.update(LISTEN_FDS="2", LISTEN_PID=str(os.getpid()))
os.execv(words[0], words)
"""


@pytest.mark.parametrize("on", [True, False])
def test_sockets_that_systemd_hands_in_are_told_apart(on: bool) -> None:
    with hosted() as host:
        if not on:
            host.layout.config.write_text('[updater]\napi = ""\n')
        words = [sys.executable, "-c", HANDING_IN, str(host.layout.state), str(host.port), *host.words()]
        host.start(words, close_fds=True)
        if on:
            assert host.remote("GET", "/v1/health")[0] == 200
        else:
            with pytest.raises(OSError, match=r"(?i)eof|reset|closed"):
                host.remote("GET", "/v1/health")
        assert host.local("GET", "/v1/health")[0] == 200


def test_an_empty_setting_opens_no_port() -> None:
    with hosted() as host:
        host.layout.config.write_text('[updater]\napi = ""\n')
        host.start()
        with pytest.raises(ConnectionRefusedError):
            host.remote("GET", "/v1/health")


def test_the_local_socket_is_for_its_owner_alone(host: Host) -> None:
    assert host.layout.socket("updater").stat().st_mode & 0o777 == 0o600
    if os.getuid() != 0:
        pytest.skip("needs root, to be somebody else")
    path = host.layout.socket("updater")
    os.chmod(path, 0o666)
    os.chmod(host.folder, 0o755)
    os.chmod(host.layout.run, 0o755)
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setuid(65534)
            connection = LocalConnection(path)
            answer = ask(connection, "GET", "/v1/health")
            status = 0 if (answer[0], answer[1]["error"]["code"]) == (403, "not-allowed") else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.chmod(path, 0o600)


@pytest.mark.parametrize(
    "api", ["7612", "localhost:7612", "127.0.0.1:0", "127.0.0.1:70000", "::1:7612", "1.2.3:1"]
)
def test_addresses_that_cannot_be(api: str) -> None:
    with pytest.raises(InputError, match=r"updater\.api"):
        read_settings({"updater": {"api": api}})


@pytest.mark.parametrize("api", ["", "127.0.0.1:7612", "[::1]:7612", "0.0.0.0:1"])
def test_addresses_that_can_be(api: str) -> None:
    assert read_settings({"updater": {"api": api}}).updater.api == api
