"""The hand-written frames and upgrade: against wsproto's server side, and against what no server should send."""

from __future__ import annotations

import base64
import hashlib
import random
import struct

import pytest
from wsproto import ConnectionType, WSConnection, events

from instar.wire.frames import BINARY, CLOSE, PING, TEXT, masked
from instar.wire.websocket import ABNORMAL, ClientSocket, Closed, Event, Opened, Rejected, Text, TooLarge

LIMIT = 70_000
KEY = b"\x07" * 16
ACCEPT = base64.b64encode(
    hashlib.sha1(base64.b64encode(KEY) + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
).decode()
YES = f"HTTP/1.1 101 ok\r\nUpgrade: WebSocket\r\nConnection: keep-alive, Upgrade\r\nSec-WebSocket-Accept: {ACCEPT}\r\n"


def client(limit: int = LIMIT) -> ClientSocket:
    return ClientSocket("s:1", "/v1/channel", {}, limit, random_bytes=lambda size: b"\x07" * size)


def opened(limit: int = LIMIT) -> ClientSocket:
    made = client(limit)
    assert made.receive(f"{YES}\r\n".encode()) == [Opened()]
    made.take()
    return made


def fed(socket: ClientSocket, data: bytes, chance: random.Random) -> list[Event]:
    found: list[Event] = []
    while data:
        size = chance.randint(1, 1 + len(data) // 2)
        found += socket.receive(data[:size])
        data = data[size:]
    return found


def frame(first: int, payload: bytes) -> bytes:
    return bytes([first, len(payload)]) + payload


# --- frames


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 65_537])
def test_each_form_of_length_both_ways(size: int) -> None:
    socket = opened()
    server = WSConnection(ConnectionType.SERVER)
    server.receive_data(client().take())
    next(iter(server.events()))
    server.send(events.AcceptConnection())
    socket.send_text("x" * size)
    server.receive_data(socket.take())
    assert (
        "".join(event.data for event in server.events() if isinstance(event, events.TextMessage))
        == "x" * size
    )
    assert socket.receive(server.send(events.TextMessage("y" * size))) == [Text("y" * size)]


def test_every_frame_has_a_new_mask() -> None:
    socket = ClientSocket("s:1", "/", {}, LIMIT)
    key = next(line for line in socket.take().split(b"\r\n") if line.startswith(b"Sec-WebSocket-Key"))[19:]
    accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()).decode()
    assert socket.receive(f"{YES.replace(ACCEPT, accept)}\r\n".encode()) == [Opened()]
    masks = set()
    for _ in range(20):
        socket.send_text("same")
        masks.add(socket.take()[2:6])
    assert len(masks) == 20


def test_mask_is_applied_as_the_standard_says() -> None:
    """RFC 6455, 5.7: a masked 'Hello'."""
    assert masked(TEXT, b"Hello", bytes.fromhex("37fa213d")) == bytes.fromhex("818537fa213d7f9f4d5158")


def test_streams_in_random_pieces() -> None:
    chance = random.Random(5)
    for _ in range(100):
        texts = ["é" * chance.choice([0, 1, 60, 63, 200, 33_000]) for _ in range(4)]
        data = b""
        for text in texts:
            raw = text.encode()
            cut = chance.randint(0, len(raw))
            data += frames_of(raw[:cut], TEXT, final=False) + frame(0x80 | PING, b"p")
            data += frames_of(raw[cut:], 0, final=True)
        socket = opened()
        assert fed(socket, data, chance) == [Text(text) for text in texts]
        assert socket.take() == masked(0xA, b"p", b"\x07" * 4) * 4


def frames_of(payload: bytes, opcode: int, final: bool) -> bytes:
    head, size = bytes([opcode | (0x80 if final else 0)]), len(payload)
    if size < 126:
        return head + bytes([size]) + payload
    return (
        head + (struct.pack("!BH", 126, size) if size < 65_536 else struct.pack("!BQ", 127, size)) + payload
    )


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(0xC1, b"x"), 1002),  # an extension's bit
        (frame(0x83, b"x"), 1002),  # an opcode that is none
        (frame(0x80, b"x"), 1002),  # goes on with nothing
        (frame(0x01, b"x") + frame(0x81, b"y"), 1002),  # a second message inside the first
        (frame(0x09, b"x"), 1002),  # a divided ping
        (b"\x89\x7e\x00\x7e" + b"x" * 126, 1002),  # a long ping
        (b"\x81\x81\0\0\0\0x", 1002),  # masked
        (b"\x81\x7e\x00\x05hello", 1002),  # a length that is longer than it must be
        (b"\x81\x7f" + (65_535).to_bytes(8, "big"), 1002),
        (b"\x81\x7f" + b"\xff" * 8, 1002),
        (frame(0x88, b"\x03"), 1002),  # half a code
        (frame(0x88, b"\x03\xed"), 1002),  # 1005 stands for 'none' and is never sent
        (frame(0x88, b"\x03\xe8\xff"), 1007),
        (frame(0x81, b"\xff"), 1007),
        (frame(0x01, b"\xc3") + frame(0x80, b"("), 1007),
    ],
)
def test_a_fault_of_the_peer_is_told_and_final(data: bytes, code: int) -> None:
    socket = opened()
    assert socket.receive(frame(0x81, b"before") + data) == [Text("before"), *socket_end(socket, data)]
    said = socket.take()
    assert said[0] == 0x80 | CLOSE
    assert bytes(a ^ 7 for a in said[6:8]) == code.to_bytes(2, "big")
    assert socket.receive(frame(0x81, b"after")) == []


def socket_end(socket: ClientSocket, data: bytes) -> list[Event]:
    """The one Closed that the same bytes give another client."""
    (end,) = opened().receive(data)
    assert isinstance(end, Closed)
    assert end.code == ABNORMAL
    assert socket.done
    return [end]


def test_a_large_frame_is_judged_by_its_header() -> None:
    socket = opened(100)
    (end,) = socket.receive(b"\x81\x7f" + (1 << 40).to_bytes(8, "big"))
    assert isinstance(end, Closed)
    assert end.code == 1009
    socket = opened(100)
    assert socket.receive(frames_of(b"x" * 1500, TEXT, final=True)[:-1]) == []
    assert len(socket._kept) == 0
    assert socket.receive(b"x" + frame(0x81, b"next")) == [TooLarge(1500), Text("next")]


def test_binary_inside_a_text_is_a_fault() -> None:
    (end,) = opened().receive(frame(0x01, b"x") + frame(0x80 | BINARY, b"y"))
    assert isinstance(end, Closed)


def test_mutations_of_good_streams_raise_nothing() -> None:
    chance = random.Random(1)
    good = (
        f"{YES}\r\n".encode() + frames_of(b'{"t":"ping","n":1}', TEXT, True) * 3 + frame(0x88, b"\x03\xe8bye")
    )
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        socket = client(500)
        found = fed(socket, bytes(data), chance) + socket.receive(b"")
        assert sum(isinstance(event, (Closed, Rejected)) for event in found) == 1
        assert socket.done


# --- the upgrade


def test_what_comes_right_behind_the_upgrade_is_read() -> None:
    assert client().receive(f"{YES}\r\n".encode() + frame(0x81, b"hi")) == [Opened(), Text("hi")]


def test_interim_answers_are_passed_over() -> None:
    assert client().receive(f"HTTP/1.1 103 hints\r\nLink: x\r\n\r\n{YES}\r\n".encode()) == [Opened()]


@pytest.mark.parametrize(
    "answer",
    [
        YES.replace(ACCEPT, ACCEPT[::-1]),
        YES.replace("WebSocket\r\n", "h2c\r\n", 1),
        YES.replace("Connection: keep-alive, Upgrade", "Connection: close"),
        YES + "Sec-WebSocket-Extensions: permessage-deflate\r\n",
        YES + "Sec-WebSocket-Protocol: chat\r\n",
        YES + f"Sec-WebSocket-Accept: {ACCEPT}\r\n",
        YES + "no colon\r\n",
        YES + " folded: line\r\n",
        YES.replace("HTTP/1.1", "HTTP/2"),
        "HTTP/1.1 103 hints\r\nLink: x\r\n\r\n" * 1000,
    ],
)
def test_an_upgrade_without_its_proofs_is_none(answer: str) -> None:
    (end,) = client().receive(f"{answer}\r\n".encode())
    assert isinstance(end, Closed)
    assert end.code == ABNORMAL
    assert "cannot open the channel: expected" in end.reason


def test_rejections_without_a_readable_body() -> None:
    chunked = b"HTTP/1.1 503 no\r\nTransfer-Encoding: chunked\r\nRetry-After: 3\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    assert client().receive(chunked) == [Rejected(503, b"", 3.0)]
    assert client().receive(b"HTTP/1.1 403 no\r\nContent-Length: 0\r\n\r\n") == [Rejected(403, b"", 0.0)]
