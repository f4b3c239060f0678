"""The sans-I/O WebSocket client against wsproto's server side, byte by byte where it matters."""

from __future__ import annotations

import pytest
from wsproto import ConnectionType, WSConnection, events

from instar.wire.websocket import (
    ABNORMAL,
    BAD_DATA,
    TOO_BIG,
    ClientSocket,
    Closed,
    Event,
    Opened,
    Rejected,
    Text,
    TooLarge,
)

LIMIT = 1000


def pair() -> tuple[ClientSocket, WSConnection]:
    """A client and a server after the upgrade."""
    client = ClientSocket("server:1", "/v1/channel", {"Instar-Program": "agent 1 ab"}, LIMIT)
    server = WSConnection(ConnectionType.SERVER)
    server.receive_data(client.take())
    request = next(iter(server.events()))
    assert isinstance(request, events.Request)
    assert (b"instar-program", b"agent 1 ab") in request.extra_headers
    assert client.receive(server.send(events.AcceptConnection())) == [Opened()]
    return client, server


def heard(server: WSConnection, data: bytes) -> list[events.Event]:
    server.receive_data(data)
    return list(server.events())


def in_pieces(client: ClientSocket, data: bytes) -> list[Event]:
    return [event for at in range(len(data)) for event in client.receive(data[at : at + 1])]


def test_texts_go_both_ways() -> None:
    client, server = pair()
    client.send_text("hällo")
    (event,) = heard(server, client.take())
    assert isinstance(event, events.TextMessage)
    assert event.data == "hällo"
    assert in_pieces(client, server.send(events.TextMessage("zurück"))) == [Text("zurück")]


def test_fragments_are_joined_and_a_ping_between_them_is_answered() -> None:
    client, server = pair()
    data = server.send(events.TextMessage("one ", message_finished=False))
    data += server.send(events.Ping(b"?"))
    data += server.send(events.TextMessage("two", message_finished=True))
    assert client.receive(data) == [Text("one two")]
    (pong,) = heard(server, client.take())
    assert pong == events.Pong(b"?")


def test_size_is_counted_in_bytes_up_to_the_limit() -> None:
    client, server = pair()
    assert client.receive(server.send(events.TextMessage("é" * (LIMIT // 2)))) == [Text("é" * (LIMIT // 2))]
    assert client.receive(server.send(events.TextMessage("é" * (LIMIT // 2 + 1)))) == [TooLarge(LIMIT + 2)]
    assert client.receive(server.send(events.TextMessage("still here"))) == [Text("still here")]


def test_fragments_count_together() -> None:
    client, server = pair()
    data = b"".join(
        server.send(events.TextMessage("x" * 300, message_finished=number == 3)) for number in range(4)
    )
    assert client.receive(data) == [TooLarge(1200)]


def test_an_endless_text_is_cut_off() -> None:
    client, server = pair()
    found: list[Event] = []
    for _ in range(100):
        found += client.receive(server.send(events.TextMessage("x" * LIMIT, message_finished=False)))
    assert [type(event) for event in found] == [Closed]
    assert isinstance(found[0], Closed)
    assert found[0].code == TOO_BIG
    (close,) = heard(server, client.take())
    assert isinstance(close, events.CloseConnection)
    assert close.code == TOO_BIG


def test_binary_is_refused() -> None:
    client, server = pair()
    (event,) = client.receive(server.send(events.BytesMessage(b"\0")))
    assert isinstance(event, Closed)
    assert event.code == BAD_DATA


def test_close_is_answered_and_final() -> None:
    client, server = pair()
    assert client.receive(server.send(events.CloseConnection(1001, "going"))) == [Closed(1001, "going")]
    (answer,) = heard(server, client.take())
    assert isinstance(answer, events.CloseConnection)
    client.send_text("too late")
    client.close()
    assert client.take() == b""
    assert client.receive(b"anything") == []


def test_own_close_is_answered() -> None:
    client, server = pair()
    client.close(1000)
    (event,) = heard(server, client.take())
    assert isinstance(event, events.CloseConnection)
    assert client.receive(server.send(event.response())) == [Closed(1000, "")]


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 20, b"\x81\xff", b"\x81\x02\xc3\x28", b"\x80\x01a", b"\xc1\x01a"]
)
def test_garbage_ends_the_connection_and_raises_nothing(garbage: bytes) -> None:
    client, _ = pair()
    found = client.receive(garbage)
    found += client.receive(b"")
    assert [type(event) for event in found] == [Closed]


def test_end_without_a_word() -> None:
    client, _ = pair()
    assert client.receive(b"") == [Closed(ABNORMAL, "")]
    unopened = ClientSocket("s:1", "/", {}, LIMIT)
    assert [type(event) for event in unopened.receive(b"")] == [Closed]


def test_rejection_keeps_status_body_and_wait() -> None:
    client = ClientSocket("s:1", "/", {}, LIMIT)
    answer = b'HTTP/1.1 429 Too Many\r\nRetry-After: 7\r\nContent-Length: 15\r\n\r\n{"error": "now"}'[:-1]
    assert in_pieces(client, answer) == [Rejected(429, b'{"error": "now"', 7.0)]


def test_rejection_without_an_end_is_bounded() -> None:
    client = ClientSocket("s:1", "/", {}, LIMIT)
    head = b"HTTP/1.1 500 no\r\n\r\n"
    assert client.receive(head + b"x" * 100_000) == []
    (event,) = client.receive(b"")
    assert isinstance(event, Rejected)
    assert (event.status, len(event.body)) == (500, 4096)


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 101 yes\r\n\r\n", b"\0" * 70_000])
def test_no_http_is_a_lost_connection(answer: bytes) -> None:
    client = ClientSocket("s:1", "/", {}, LIMIT)
    assert [type(event) for event in client.receive(answer)] == [Closed]
