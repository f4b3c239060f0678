"""The updater's API (requirement D1): a real updater's process, real sockets, real TLS."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from instar.core.errors import InputError, MachineError
from instar.core.settings import read_settings
from instar.host.sockets import ask as ask_line
from instar.updater.http import openapi
from instar.updater.http.connection import Body, Connection, Pace
from instar.updater.http.heads import Head, parse
from instar.updater.http.listener import Listener
from instar.updater.http.routes import ROUTES
from tests.node import updater_host
from tests.node.updater_host import NODE, Host, LocalConnection, Papers, Parcel, ask, context, hosted

MIB = 1 << 20
PASSING_S = 20.0


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with hosted() as made:
        made.start()
        yield made


@pytest.fixture
def quiet(host: Host) -> Host:
    """Nothing under way, and nothing in `incoming`."""
    updater_host.wait_for(lambda: not host.local("GET", "/v1/health")[1]["transaction"], 30.0, host.log)
    shutil.rmtree(host.layout.incoming, ignore_errors=True)
    return host


# --- who may call


def test_the_local_socket_speaks_both_protocols(host: Host) -> None:
    status, health = host.local("GET", "/v1/health")
    line = ask_line(host.layout.socket("updater"), {"do": "health"}, 5.0)
    assert status == 200
    assert (health["version"], health["digest"], health["pid"]) == (
        line["version"],
        line["digest"],
        line["pid"],
    )
    assert (health["node"], health["held"], health["receiving"]) == (NODE, {}, None)
    assert health["release"] == f"1.0.0-{health['digest'][:12]}"


def test_an_operator_is_served_over_tls_by_the_node_itself(host: Host) -> None:
    with contextlib.closing(host.raw()) as secure:
        certificate = secure.getpeercert()
        assert certificate is not None
        assert certificate["subjectAltName"] == (("URI", f"instar://node/{NODE}"),)
        assert secure.version() in ("TLSv1.2", "TLSv1.3")
    assert host.remote("GET", "/v1/health") == host.local("GET", "/v1/health")


def test_a_nodes_certificate_is_no_operators(host: Host) -> None:
    with contextlib.closing(host.connection(host.papers.node("n-00000000000000aa"))) as connection:
        status, body = ask(connection, "GET", "/v1/health")
    assert (status, body["error"]["code"]) == (403, "not-an-operator")


@pytest.mark.parametrize("highest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_strangers_are_turned_away_by_tls(host: Host, tmp_path: Path, highest: ssl.TLSVersion) -> None:
    other = Papers(tmp_path / "other")
    expired = host.papers.operator("late", lifetime_s=60.0, now=time.time() - 3600)
    for papers in (None, other.operator(), expired):
        made = context(host.papers.ca, papers)
        made.maximum_version = highest
        with pytest.raises(OSError, match=r"(?i)alert|reset|eof"):
            served(host, made)
    assert host.remote("GET", "/v1/health")[0] == 200


def served(host: Host, made: ssl.SSLContext) -> None:
    with (
        socket.create_connection(("127.0.0.1", host.port), timeout=5.0) as plain,
        made.wrap_socket(plain) as secure,
    ):
        secure.sendall(b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert secure.recv(1) == b"", "it was served"
        raise ConnectionError("eof")


def test_plain_http_is_not_answered(host: Host) -> None:
    with socket.create_connection(("127.0.0.1", host.port), timeout=5.0) as plain:
        plain.sendall(b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"HTTP" not in plain.recv(100)


def test_a_renewed_certificate_is_used_at_once(host: Host) -> None:
    def serial() -> str:
        with contextlib.closing(host.raw()) as secure:
            return str((secure.getpeercert() or {})["serialNumber"])

    before = serial()
    certificate, key = host.papers.node()
    os.replace(key, host.layout.key)
    os.replace(certificate, host.layout.certificate)
    assert serial() != before


# --- requests


def answered(host: Host, raw: bytes) -> tuple[int, dict[str, Any]]:
    """What comes back for these bytes over the local socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as plain:
        plain.settimeout(PASSING_S)
        plain.connect(str(host.layout.socket("updater")))
        plain.sendall(raw)
        answer = http.client.HTTPResponse(plain)
        answer.begin()
        return answer.status, json.loads(answer.read())


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"GET /v1/nothing HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not-found"),
        (b"GET /v1/transactions/../x HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not-found"),
        (b"GET /v1/transactions/tx-0000000000000000 HTTP/1.1\r\nHost: x\r\n\r\n", 404, "unknown-transaction"),
        (b"DELETE /v1/health HTTP/1.1\r\nHost: x\r\n\r\n", 405, "method-not-allowed"),
        (b"GET /v1/health?all=1 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad-request"),
        (b"GET /v1/transactions?limit=0 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad-request"),
        (b"GET /v1/transactions?limit=nan HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad-request"),
        (b"GET /v1/transactions?limit=1&limit=2 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad-request"),
        (b"GET /v1/health HTTP/1.1\r\n\r\n", 400, "bad-request"),
        (b"POST /v1/look HTTP/1.1\r\nHost: x\r\nOrigin: https://x\r\n\r\n", 403, "not-allowed"),
        (b"GET /v1/health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400, "bad-request"),
        (b"GET /v1/health HTTP/1.1\r\nHost: x\r\n folded: y\r\n\r\n", 400, "bad-request"),
        (b"GET /v1/health HTTP/1.1\r\nHost: x\nA: b\r\n\r\n", 400, "bad-request"),
        (b"GET  /v1/health HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad-request"),
        (b"GET /v1/health HTTP/2.0\r\nHost: x\r\n\r\n", 505, "bad-version"),
        (b"GET\x16\x03 / HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad-request"),
        (b"GET /v1/health HTTP/1.1\r\nHost: x\r\nContent-Length: +3\r\n\r\n", 400, "bad-request"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n", 400, "bad-request"),
        (b"POST /v1/look HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", 411, "length-required"),
        (b"POST /v1/look HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n[]", 400, "bad-request"),
        (b"POST /v1/look HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{\"a\": 1}\n", 400, "bad-request"),
        (b"POST /v1/rollback HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n", 413, "too-large"),
        (b"GET /v1/health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 16_384, 431, "head-too-large"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_answered_is_told_why(
    host: Host, raw: bytes, status: int, code: str
) -> None:
    got, body = answered(host, raw)
    assert (got, body["error"]["code"]) == (status, code)
    check(openapi.SCHEMAS["Error"], body)
    method, path = (
        raw.split(b" ")[0].decode("latin-1").lower(),
        raw.split(b" ")[1].split(b"?")[0].decode("latin-1"),
    )
    template = re.sub(r"tx-\w+", "{tx}", path)
    described = openapi.document("1")["paths"].get(template, {})
    if method in described and status != 505:
        assert str(status) in described[method]["responses"]


def test_a_head_of_the_largest_size_is_taken(host: Host) -> None:
    start = b"GET /v1/health HTTP/1.1\r\nHost: x\r\nA: "
    assert answered(host, start + b"a" * (16_384 - len(start) - 4) + b"\r\n\r\n")[0] == 200


def test_requests_follow_each_other_on_one_connection(host: Host) -> None:
    with contextlib.closing(host.connection()) as connection:
        for _ in range(5):
            assert ask(connection, "GET", "/v1/health")[0] == 200
            kept = connection.sock
            assert ask(connection, "POST", "/v1/look", {})[0] == 202
            assert connection.sock is kept, "it had to connect anew"
    twice = b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n" * 2
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as plain:
        plain.connect(str(host.layout.socket("updater")))
        plain.sendall(twice)
        plain.shutdown(socket.SHUT_WR)
        assert b"".join(iter(lambda: plain.recv(65_536), b"")).count(b"HTTP/1.1 200 OK") == 2


def test_what_it_takes_to_be_a_head() -> None:
    raw = b"POST /v1/push?line=updater HTTP/1.1\r\nhost: n:1\r\ncontent-length:  7 \r\nConnection: Close"
    fields = {"host": "n:1", "content-length": "7", "connection": "Close"}
    assert parse(raw) == Head("POST", "/v1/push", {"line": "updater"}, fields, 7, keeps=False)


# --- what is shown


def check(schema: dict[str, Any], value: Any) -> None:
    jsonschema_rs.validate({**schema, "components": {"schemas": openapi.SCHEMAS}}, value)


def test_the_document_has_every_route_and_no_other(host: Host) -> None:
    status, document = host.remote("GET", "/v1/openapi.json")
    assert status == 200
    described = {(m.upper(), path) for path, calls in document["paths"].items() for m in calls}
    assert described == {(route.method, route.path) for route in ROUTES}
    for route in ROUTES:
        parameters = document["paths"][route.path][route.method.lower()].get("parameters", [])
        assert {p["name"] for p in parameters if p["in"] == "query"} == set(route.query), route.path
        assert {p["name"] for p in parameters if p["in"] == "path"} == set(re.findall(r"{(\w+)}", route.path))


@pytest.mark.parametrize(
    ("path", "schema"),
    [("/v1/health", "Health"), ("/v1/releases", "Releases"), ("/v1/transactions?limit=3", "Transactions")],
)
def test_answers_are_as_the_document_says(host: Host, path: str, schema: str) -> None:
    status, body = host.local("GET", path)
    assert status == 200
    check(openapi.SCHEMAS[schema], body)


def test_the_releases_of_each_line(host: Host) -> None:
    _, body = host.local("GET", "/v1/releases")
    built = updater_host.program()
    for role in ("agent", "updater"):
        shown = body["lines"][role]
        (release,) = shown["releases"]
        assert (release["version"], release["digest"]) == ("1.0.0", built.digest)
        assert (release["current"], release["previous"], release["valid"]) == (True, False, True)
        assert abs(release["installed"] - time.time()) < 3600
        assert (shown["current"], shown["previous"], shown["trial"]) == (release["name"], "", "")


def test_with_nothing_to_roll_back_to_that_is_said(host: Host) -> None:
    status, body = host.local("POST", "/v1/rollback", body={"line": "agent"})
    assert (status, body["error"]["code"]) == (409, "nothing-to-roll-back-to")
    assert host.local("POST", "/v1/rollback", body={"line": "kernel"})[1]["error"]["code"] == "unknown-line"


# --- push


def push(host: Host, parcel: Parcel, line: str = "agent", **fields: str) -> tuple[int, Any]:
    with contextlib.closing(host.connection()) as connection:
        headers = parcel.fields(**fields)
        connection.request("POST", f"/v1/push?line={line}", parcel.blocks(), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def test_a_push_becomes_a_transaction_and_what_nobody_signed_goes_no_further(quiet: Host) -> None:
    parcel = Parcel(MIB)
    status, body = push(quiet, parcel)
    assert (status, body["line"], body["version"]) == (202, "agent", "1.1.0"), body
    check(openapi.SCHEMAS["Pushed"], body)
    with contextlib.closing(quiet.connection()) as connection:
        connection.request("GET", f"/v1/transactions/{body['tx']}/events")
        answer = connection.getresponse()
        assert answer.getheader("Content-Type") == "text/event-stream"
        events = [json.loads(line[6:]) for line in answer.read().splitlines() if line.startswith(b"data: ")]
    for event in events:
        check(openapi.SCHEMAS["Transaction"], event)
    last = events[-1]
    assert (last["state"], last["finished"], last["cause"]) == ("reverted", True, "push"), last
    assert last["reason"]["code"], last
    assert quiet.remote("GET", f"/v1/transactions/{body['tx']}?wait_s=5") == (200, last)
    assert quiet.remote("GET", "/v1/transactions?limit=1")[1]["transactions"] == [last]
    assert quiet.local("GET", "/v1/releases")[1]["lines"]["agent"]["current"].startswith("1.0.0-")


@pytest.mark.parametrize(
    ("change", "line", "status", "code"),
    [
        ({"Instar-SHA384": "0" * 96}, "agent", 400, "altered-parcel"),
        ({"Instar-SHA384": "xyz"}, "agent", 400, "bad-digest"),
        ({"Instar-SHA384": ""}, "agent", 400, "bad-digest"),
        ({}, "module/inventory", 400, "unknown-line"),
        ({}, "../../etc", 400, "unknown-line"),
        ({"Content-Length": str(1 << 40)}, "agent", 413, "too-large"),
        ({"Content-Length": "0"}, "agent", 411, "length-required"),
    ],
)  # fmt: skip
def test_a_push_that_says_something_wrong_leaves_nothing(
    quiet: Host, change: dict[str, str], line: str, status: int, code: str
) -> None:
    got, body = push(quiet, Parcel(MIB), line, **change)
    assert (got, body["error"]["code"]) == (status, code)
    assert str(status) in openapi.document("1")["paths"]["/v1/push"]["post"]["responses"]
    assert nothing_of_it(quiet)


def nothing_of_it(host: Host) -> bool:
    health = host.local("GET", "/v1/health")[1]
    return not host.left_over() and not health["transaction"] and health["receiving"] is None


@pytest.mark.parametrize(
    ("parcel", "code"),
    [
        (Parcel(MIB, kind="recovery"), "wrong-kind"),
        (Parcel(MIB, version="1.0.0", digest=updater_host.program().digest), "already-current"),
    ],
)
def test_a_parcel_that_is_of_no_use_leaves_nothing(quiet: Host, parcel: Parcel, code: str) -> None:
    status, body = push(quiet, parcel)
    assert (status in (400, 409), body["error"]["code"]) == (True, code)
    assert nothing_of_it(quiet)


def test_a_body_that_is_no_parcel_leaves_nothing(quiet: Host) -> None:
    import hashlib

    data = os.urandom(3 * MIB)
    fields = {"Instar-SHA384": hashlib.sha384(data).hexdigest()}
    with contextlib.closing(quiet.connection()) as connection:
        connection.request("POST", "/v1/push?line=agent", data, fields)
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (400, "bad-parcel")
    assert nothing_of_it(quiet)


def test_a_body_that_ends_early_is_refused_and_leaves_nothing(quiet: Host) -> None:
    parcel = Parcel(4 * MIB)
    head = begin_push(parcel)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as plain:
        plain.settimeout(PASSING_S)
        plain.connect(str(quiet.layout.socket("updater")))
        plain.sendall(head + parcel.data[: 3 * MIB])
        plain.shutdown(socket.SHUT_WR)
        answer = http.client.HTTPResponse(plain)
        answer.begin()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (400, "cut-off")
    assert nothing_of_it(quiet)
    with contextlib.closing(quiet.raw()) as secure:  # and over TLS, by somebody who just goes away
        secure.sendall(head + parcel.data[: 3 * MIB])
        assert quiet.local("GET", "/v1/health")[1]["receiving"]
    updater_host.wait_for(lambda: nothing_of_it(quiet), PASSING_S, quiet.log)


def test_what_a_killed_updater_has_left_of_a_push_goes_with_the_next() -> None:
    parcel = Parcel(4 * MIB)
    with hosted() as host:
        host.start()
        with contextlib.closing(host.raw()) as secure:
            secure.sendall(begin_push(parcel) + parcel.data[: 3 * MIB])
            updater_host.wait_for(host.left_over, PASSING_S, host.log)
            assert host.process is not None
            host.process.kill()
            host.process.wait()
        assert host.left_over()
        host.start()
        assert host.left_over() == []


def test_a_push_that_was_accepted_outlives_a_killed_updater() -> None:
    parcel = Parcel(MIB)
    with hosted() as host:
        host.start()
        journal, away = host.layout.journal, host.layout.journal.with_name("away")
        journal.rename(away)
        journal.write_text("")  # so that it cannot be begun before the kill
        status, body = host.local(
            "POST", "/v1/push?line=agent", body=parcel.data, Instar_SHA384=parcel.sha384
        )
        assert status == 202, body
        assert host.process is not None
        host.process.kill()
        host.process.wait()
        journal.unlink()
        away.rename(journal)
        host.start()
        ended = updater_host.wait_for(
            lambda: (
                (found := host.local("GET", f"/v1/transactions/{body['tx']}"))[0] == 200
                and found[1]["state"] == "reverted"
            ),
            PASSING_S,
            host.log,
        )
        assert ended, "its metadata are of no use, and that is said"
        assert not host.layout.orders.exists()


def begin_push(parcel: Parcel, line: str = "agent", more: str = "") -> bytes:
    fields = "".join(f"{name}: {value}\r\n" for name, value in parcel.fields().items())
    return f"POST /v1/push?line={line} HTTP/1.1\r\nHost: x\r\n{fields}{more}\r\n".encode()


def test_one_at_a_time_also_while_a_push_is_on_its_way(quiet: Host) -> None:
    parcel = Parcel(4 * MIB)
    with contextlib.closing(quiet.raw()) as first:
        first.sendall(begin_push(parcel, more="Expect: 100-continue\r\n"))
        assert first.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        first.sendall(parcel.data[: 3 * MIB])
        receiving = updater_host.wait_for(
            lambda: (r := quiet.local("GET", "/v1/health")[1]["receiving"]) and r["done"] and r,
            PASSING_S,
            quiet.log,
        )
        tx = receiving["tx"]
        assert receiving["total"] == parcel.length
        shown = quiet.remote("GET", f"/v1/transactions/{tx}")[1]
        check(openapi.SCHEMAS["Transaction"], shown)
        assert (shown["state"], shown["bytes"]["total"]) == ("receiving", parcel.length)
        for status, body in (
            push(quiet, Parcel(MIB), "updater"),
            quiet.local("POST", "/v1/rollback", body={"line": "agent"}),
        ):
            if body["error"]["code"] != "nothing-to-roll-back-to":
                assert (status, body["error"]["code"]) == (409, "busy")
                assert tx in body["error"]["message"]
        first.sendall(parcel.data[3 * MIB :])
        answer = http.client.HTTPResponse(first)
        answer.begin()
        assert (answer.status, json.loads(answer.read())["tx"]) == (202, tx)


def test_a_push_of_200_mb_takes_no_memory() -> None:
    with hosted() as host:
        host.start()
        assert host.remote("GET", "/v1/health")[0] == 200
        parcel = Parcel(200 * 1000 * 1000)
        before = host.memory("VmHWM")
        status, body = push(host, parcel)
        assert status == 202, body
        grown = host.memory("VmHWM") - before
        print(f"peak {before / MIB:.1f} MiB before, {grown / MIB:.2f} MiB more after")
        assert grown < 8 * MIB
        host.remote("GET", f"/v1/transactions/{body['tx']}?wait_s=30")
        assert host.memory("VmHWM") - before < 8 * MIB, "its transaction took more"


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
    while any(thread.is_alive() for thread in threads):
        asked = time.monotonic()
        assert host.remote("GET", "/v1/health")[0] == 200
        assert time.monotonic() - asked < 4.0
        time.sleep(0.5)
    assert 4.0 < ended["no handshake"] < 9.0
    assert 9.0 < ended["no head"] < 14.0


def test_a_body_must_come_on() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        body = Body(Connection(ours), 1000, Pace(stall_s=0.3, stall_bytes=100, whole_s=60.0))
        theirs.sendall(bytes(150))
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
        silent = [plain() for _ in range(6)]
        waiting = [
            stack.enter_context(contextlib.closing(no_operator.wrap_socket(plain()))) for _ in range(6)
        ]
        began = time.monotonic()
        assert host.remote("GET", "/v1/health")[0] == 200
        assert time.monotonic() - began < 4.0
        assert silent[0].recv(1) == b""
        assert host.local("GET", "/v1/health")[0] == 200
        operator.sendall(b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n")  # one that was there before them
        assert operator.recv(100).startswith(b"HTTP/1.1 200 OK")
        assert waiting


def test_a_node_is_told_that_it_is_no_operator_before_it_asks(host: Host) -> None:
    began = time.monotonic()
    with contextlib.closing(host.raw(host.papers.node("n-00000000000000aa"))) as secure:
        said = b"".join(iter(lambda: secure.recv(65_536), b""))
        assert said.startswith(b"HTTP/1.1 403 ")
        assert b"not-an-operator" in said
    assert time.monotonic() - began < 5.0


def test_operators_have_places_of_their_own(host: Host) -> None:
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(contextlib.closing(host.raw())) for _ in range(16)]
        for each in kept:
            each.sendall(b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert each.recv(100).startswith(b"HTTP/1.1 200 OK")
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
    with socket.create_connection(("127.0.0.1", port), timeout=5.0):
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

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        listener = Listener(tmp_path / "s", f"127.0.0.1:{port}", serve, serve, retry_s=0.1)
        listener.start()
        time.sleep(0.5)
        assert [record.message for record in caplog.records].count(
            f"the API cannot listen on 127.0.0.1 port {port}: Address already in use; trying again"
        ) == 1
    end = time.monotonic() + 5.0
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
