"""host.transport against a real TLS server."""

from __future__ import annotations

import hashlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from instar.core.errors import InputError, MachineError, ServerRefused, ServerUnreachable
from instar.engine.fetch import Limits, fetch
from instar.host.transport import MOST_BYTES, Endpoint, Transport, host_port
from tests.node.tls_server import Authority, Handler, Proxy, TlsServer, answer
from tests.node.updater_host import free_port

DATA = bytes(range(256)) * 2000
WITHIN_S = 30.0


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


Made = tuple[TlsServer, Transport]


@pytest.fixture
def make(authority: Authority) -> Iterator[Callable[..., Made]]:
    made: list[Any] = []

    def build(handler: Handler, **changes: Any) -> Made:
        server = TlsServer(authority, handler)
        fields = {"ca": authority.ca, "program": "updater 1.0.0 abc", "timeout_s": WITHIN_S, **changes}
        transport = Transport(Endpoint(f"https://127.0.0.1:{server.port}", **fields))
        made.extend([transport, server])
        return server, transport

    yield build
    for each in made:
        each.close()


def says(body: bytes, status: str = "200 OK") -> Handler:
    return lambda line, headers, secure: answer(secure, body, status)


def test_a_call_is_made_on_one_kept_connection_with_the_programs_name(make: Callable[..., Made]) -> None:
    server, transport = make(says(b'{"a": 1}'))
    assert transport.call("GET", "/v1/x") == {"a": 1}
    assert transport.call("POST", "/v1/y", {"b": 2}) == {"a": 1}
    assert server.connections == 1
    assert [line for line, _ in server.requests] == ["GET /v1/x HTTP/1.1", "POST /v1/y HTTP/1.1"]
    assert all(headers["instar-program"] == "updater 1.0.0 abc" for _, headers in server.requests)


def test_a_kept_connection_that_the_server_closed_is_made_again(make: Callable[..., Made]) -> None:
    def once(line: str, headers: dict[str, str], secure: ssl.SSLSocket) -> bool:
        answer(secure, b"{}")
        return False  # closes without having said so

    server, transport = make(once)
    for _ in range(3):
        assert transport.call("GET", "/") == {}
        time.sleep(0.02)
    assert server.connections == 3


def test_a_server_that_always_closes_is_unreachable_after_one_more_try(make: Callable[..., Made]) -> None:
    server, transport = make(lambda *_: False)
    with pytest.raises(ServerUnreachable):
        transport.call("GET", "/")
    assert server.connections == 1


@pytest.mark.parametrize("status", ["429 Too Many", "500 Oops", "502 Bad Gateway", "503 Busy"])
def test_a_passing_fault_is_unreachable(make: Callable[..., Made], status: str) -> None:
    _, transport = make(says(b'{"error": {"code": "busy", "message": "come again"}}', status))
    with pytest.raises(ServerUnreachable, match="come again"):
        transport.call("GET", "/")


def test_a_refusal_keeps_the_servers_code_and_words(make: Callable[..., Made]) -> None:
    _, transport = make(
        says(b'{"error": {"code": "revoked", "message": "cannot serve n-1"}}', "403 Forbidden")
    )
    with pytest.raises(ServerRefused) as caught:
        transport.call("GET", "/")
    assert (caught.value.code, caught.value.text) == ("revoked", "cannot serve n-1")


@pytest.mark.parametrize("body", [b"", b"nonsense", b"[]", b'{"error": 5}', b'{"error": {}}'])
@pytest.mark.parametrize(
    ("status", "code"), [("404 Not Found", "not-found"), ("400 Bad", "refused"), ("302 Moved", "refused")]
)
def test_a_refusal_in_an_odd_form_is_still_one(
    make: Callable[..., Made], body: bytes, status: str, code: str
) -> None:
    _, transport = make(says(body, status))
    with pytest.raises(ServerRefused) as caught:
        transport.get("/x")
    assert caught.value.code == code


def test_who_is_told_that_the_certificate_has_lapsed_reads_it_anew(
    make: Callable[..., Made], authority: Authority, tmp_path: Path
) -> None:
    """A process that lives for long outlives its certificate, which the agent has renewed meanwhile."""
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.ca.read_bytes())
    body = b'{"error": {"code": "certificate-expired", "message": "renew it"}}'
    server, transport = make(says(body, "403 Forbidden"), ca=ca)
    for _ in range(2):
        with pytest.raises(ServerRefused, match="renew it"):
            transport.call("GET", "/")
    assert server.connections == 2
    ca.write_bytes(b"something else")
    with pytest.raises(MachineError):
        transport.call("GET", "/")


def test_after_a_fault_the_next_call_works(make: Callable[..., Made]) -> None:
    answers = iter([("503 Busy", b"x"), ("200 OK", b"{}")])

    def handler(line: str, headers: dict[str, str], secure: ssl.SSLSocket) -> bool:
        status, body = next(answers)
        return answer(secure, body, status)

    _, transport = make(handler)
    with pytest.raises(ServerUnreachable):
        transport.call("GET", "/")
    assert transport.call("GET", "/") == {}


def test_an_answer_that_is_no_json_is_no_answer(make: Callable[..., Made]) -> None:
    _, transport = make(says(b"<html>"))
    with pytest.raises(ServerUnreachable) as caught:
        transport.call("GET", "/")
    assert caught.value.code == "bad-answer"


def test_a_server_of_another_ca_is_not_trusted(make: Callable[..., Made], tmp_path: Path) -> None:
    server, transport = make(says(b"{}"), ca=Authority(tmp_path / "other").ca)
    with pytest.raises(ServerUnreachable) as caught:
        transport.call("GET", "/")
    assert caught.value.code == "server-not-trusted"
    assert server.requests == []


def test_a_server_under_another_name_is_not_trusted(make: Callable[..., Made], authority: Authority) -> None:
    server, _ = make(says(b"{}"))
    transport = Transport(Endpoint(f"https://localhost:{server.port}", authority.ca, timeout_s=WITHIN_S))
    with pytest.raises(ServerUnreachable) as caught:
        transport.call("GET", "/")
    assert caught.value.code == "server-not-trusted"


def test_an_oversized_answer_is_dropped(make: Callable[..., Made]) -> None:
    def endless(line: str, headers: dict[str, str], secure: ssl.SSLSocket) -> bool:
        secure.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(2 * MOST_BYTES // 1_000_000):
            secure.sendall(b"f4240\r\n" + b"x" * 1_000_000 + b"\r\n")
        return False

    _, transport = make(endless)
    with pytest.raises(ServerUnreachable, match="over") as caught:
        transport.get("/")
    assert caught.value.code == "bad-answer"


@pytest.mark.parametrize("chunked", [False, True])
def test_an_answer_that_is_cut_off_is_no_answer(make: Callable[..., Made], chunked: bool) -> None:
    def cut(line: str, headers: dict[str, str], secure: ssl.SSLSocket) -> bool:
        if chunked:
            secure.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nhalf")
            return False
        return answer(secure, b"half", length=100)

    _, transport = make(cut)
    with pytest.raises(ServerUnreachable) as caught:
        transport.get("/")
    assert caught.value.code == "cut-off"


def test_silence_is_bounded_and_not_tried_twice(make: Callable[..., Made]) -> None:
    calls, over, spoke = iter([True, False]), threading.Event(), threading.Event()

    def silent(line: str, headers: dict[str, str], secure: ssl.SSLSocket) -> bool:
        if next(calls):
            return answer(secure, b"{}")
        if not over.wait(WITHIN_S):
            spoke.set()
        return False

    server, transport = make(silent)
    transport.call("GET", "/")
    with pytest.raises(ServerUnreachable):
        transport.call("GET", "/", timeout_s=0.3)
    assert not spoke.is_set(), "it was the server that ended it"
    over.set()
    assert server.connections == 1


def test_nobody_listens(authority: Authority) -> None:
    transport = Transport(Endpoint(f"https://127.0.0.1:{free_port()}", authority.ca))
    with pytest.raises(ServerUnreachable) as caught:
        transport.call("GET", "/")
    assert caught.value.code == "server-unreachable"


def test_a_missing_identity_is_the_machines_fault(authority: Authority, tmp_path: Path) -> None:
    endpoint = Endpoint("https://127.0.0.1:1", authority.ca, tmp_path / "cert.pem", tmp_path / "key.pem")
    with pytest.raises(MachineError) as caught:
        Transport(endpoint).call("GET", "/")
    assert caught.value.code == "bad-identity"


@pytest.mark.parametrize("url", ["", "http://h", "h:443", "https://", "https://h:port", "https://h:99999"])
def test_a_bad_address_is_refused(url: str) -> None:
    with pytest.raises(InputError) as caught:
        host_port(url, "https", 443)
    assert caught.value.code == "bad-url"


# --- streams


def serve_ranges(cuts: list[int]) -> Handler:
    def handler(line: str, headers: dict[str, str], secure: ssl.SSLSocket) -> bool:
        first, _, last = headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
        body = DATA[int(first) : int(last) + 1 if last else None]
        status = "206 Partial Content" if first != "0" or last else "200 OK"
        if cuts:
            return answer(secure, body[: cuts.pop(0)], status, length=len(body))
        return answer(secure, body, status)

    return handler


def test_a_stream_is_read_from_where_it_is_asked(make: Callable[..., Made]) -> None:
    server, transport = make(serve_ranges([]))
    with transport.stream("/x", 0) as (resumed, chunks):
        assert b"".join(chunks) == DATA
        assert not resumed
    with transport.stream("/x", 1000) as (resumed, chunks):
        assert b"".join(chunks) == DATA[1000:]
        assert resumed
    assert server.connections == 1


def test_a_stream_may_end_early_and_keeps_its_connection(make: Callable[..., Made]) -> None:
    server, transport = make(serve_ranges([]))
    for start, stop in ((0, 10), (1000, 70_000), (70_000, 70_001)):
        with transport.stream("/x", start, stop) as (resumed, chunks):
            assert resumed
            assert b"".join(chunks) == DATA[start:stop]
    assert server.connections == 1
    assert [request[1]["range"] for request in server.requests] == [
        "bytes=0-9", "bytes=1000-69999", "bytes=70000-70000"
    ]  # fmt: skip


def test_a_fetch_over_the_wire_is_resumed_after_each_cut(make: Callable[..., Made], tmp_path: Path) -> None:
    server, transport = make(serve_ranges([100_000, 1, 200_000]))
    fetch(transport, "/x", tmp_path / "f", len(DATA), Limits(retry_floor_s=0.01))
    assert (tmp_path / "f").read_bytes() == DATA
    assert server.requests[1][1]["range"] == "bytes=100000-"


def test_a_stream_that_is_left_early_does_not_spoil_the_next_call(make: Callable[..., Made]) -> None:
    server, transport = make(serve_ranges([]))
    with transport.stream("/x", 0) as (_, chunks):
        next(chunks)
    assert transport.get("/x") == DATA
    assert server.connections == 2


# --- the proxy


def test_a_proxy_is_used_by_connect_and_sees_no_request(make: Callable[..., Made]) -> None:
    proxy = Proxy()
    server, transport = make(says(b'{"a": 1}'), proxy=f"http://127.0.0.1:{proxy.port}")
    try:
        assert transport.call("GET", "/v1/secret") == {"a": 1}
        (line,) = [line for line, _ in proxy.requests]
        assert line.startswith(f"CONNECT 127.0.0.1:{server.port} HTTP/1.")
        assert "instar-program" not in proxy.requests[0][1]
    finally:
        proxy.close()


def test_a_proxy_that_is_gone_is_unreachable(make: Callable[..., Made]) -> None:
    _, transport = make(says(b"{}"), proxy=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ServerUnreachable):
        transport.call("GET", "/")


# --- a pinned certificate


def pin_of(authority: Authority) -> str:
    """Of the server's own certificate, which comes last in the file."""
    pem = authority.chain.read_text()
    der = ssl.PEM_cert_to_DER_cert(pem[pem.index("-----BEGIN CERTIFICATE") :])
    return hashlib.sha256(der).hexdigest()


def test_the_pinned_certificate_is_taken(make: Callable[..., Made], authority: Authority) -> None:
    _, transport = make(says(b'{"a": 1}'), pin=pin_of(authority))
    assert transport.call("GET", "/v1/x") == {"a": 1}
    transport.close()
    assert transport.call("GET", "/v1/x") == {"a": 1}


def test_another_one_of_the_same_ca_is_refused_before_a_word_is_said(
    make: Callable[..., Made], authority: Authority, tmp_path: Path
) -> None:
    server, transport = make(says(b"{}"), pin="ab" * 32)
    for ask in (lambda: transport.get("/v1/x"), lambda: transport.call("POST", "/v1/y", {"secret": 1})):
        with pytest.raises(ServerUnreachable) as caught:
            ask()
        assert caught.value.code == "certificate-differs"
    assert server.requests == []
    with pytest.raises(ServerUnreachable) as caught:
        fetch(transport, "/v1/x", tmp_path / "file", 5, Limits(tries=2, retry_floor_s=0.01))
    assert caught.value.code == "certificate-differs"
    assert not (tmp_path / "file").exists()


def test_a_pin_holds_through_a_proxy(make: Callable[..., Made], authority: Authority) -> None:
    proxy = Proxy()
    try:
        fields = {"proxy": f"http://127.0.0.1:{proxy.port}"}
        _, good = make(says(b'{"a": 1}'), pin=pin_of(authority), **fields)
        assert good.call("GET", "/v1/x") == {"a": 1}
        server, bad = make(says(b"{}"), pin="ab" * 32, **fields)
        with pytest.raises(ServerUnreachable, match="expected the certificate abab"):
            bad.get("/v1/x")
        assert server.requests == []
    finally:
        proxy.close()


@pytest.mark.parametrize(
    ("server", "path"),
    [
        ("https://a..b", "/x"), (f"https://{'a' * 70}.b", "/x"), ("https://.a", "/x"),
        ("https://127.0.0.1:1", "/b\u00fcndel"),
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_one_is_out_of_reach(authority: Authority, server: str, path: str) -> None:
    """Of a system bundle, an operator says it: the updater must not end of it."""
    transport = Transport(Endpoint(server, authority.ca, timeout_s=2.0, public=True))
    with pytest.raises(ServerUnreachable) as caught, transport.stream(path, 0, 9):
        pass
    assert caught.value.code == "server-unreachable"
