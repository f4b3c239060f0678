"""The updater's API (requirement D1): who may call, and what is asked. A real updater's process, real TLS."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import pytest

from instar.host.sockets import ask as ask_line
from instar.updater.http import openapi
from instar.updater.http.heads import Head, parse
from instar.updater.http.routes import ROUTES
from tests.node import updater_host
from tests.node.updater_host import (
    NODE,
    PASSING_S,
    Host,
    Papers,
    ask,
    check,
    context,
    host,
    quiet,
)

__all__ = ["host", "quiet"]  # fixtures


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
    assert body["error"]["message"].endswith("got one of instar://node/n-00000000000000aa")


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
