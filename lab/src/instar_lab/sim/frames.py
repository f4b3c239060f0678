"""Just enough WebSocket for a load generator: one client, text frames, no extensions. Bytes only.

A node's real client is instar.wire.websocket; this one exists to cost less than the server that it loads.
Frames are masked with a key of zeros, which RFC 6455 allows and which saves the masking.
"""

from __future__ import annotations

import base64
import struct

TEXT, CLOSE, PING, PONG = 0x1, 0x8, 0x9, 0xA
FINAL = 0x80
MASKED = 0x80
NO_MASK = b"\0\0\0\0"


def upgrade(host: str, path: str, key: bytes, headers: dict[str, str]) -> bytes:
    """The HTTP request that opens the channel. `key` is 16 bytes of chance."""
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: {host}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {base64.b64encode(key).decode()}",
        "Sec-WebSocket-Version: 13",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def frame(kind: int, data: bytes) -> bytes:
    size = len(data)
    if size < 126:
        return bytes((FINAL | kind, MASKED | size)) + NO_MASK + data
    if size < 65_536:
        return bytes((FINAL | kind, MASKED | 126)) + struct.pack("!H", size) + NO_MASK + data
    return bytes((FINAL | kind, MASKED | 127)) + struct.pack("!Q", size) + NO_MASK + data


class FrameReader:
    """Collects bytes of the server and hands out whole frames. Fragments are joined by the caller's luck:
    the server of this repository sends each message in one frame; anything else is a ValueError."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Every frame that is complete now: (kind, data)."""
        buffer = self._buffer
        buffer += data
        found: list[tuple[int, bytes]] = []
        start = 0
        while (end := self._end(start)) is not None:
            head, stop = end
            if not buffer[start] & FINAL or buffer[start + 1] & MASKED:
                raise ValueError("cannot read frame: expected a whole one without mask")
            found.append((buffer[start] & 0xF, bytes(buffer[head:stop])))
            start = stop
        del buffer[:start]
        return found

    def _end(self, start: int) -> tuple[int, int] | None:
        """Where the frame's data starts and ends; None while bytes are missing."""
        have = len(self._buffer) - start
        if have < 2:
            return None
        size, head = self._buffer[start + 1] & 0x7F, 2
        if size == 126:
            head = 4
        elif size == 127:
            head = 10
        if have < head:
            return None
        if head > 2:
            size = int.from_bytes(self._buffer[start + 2 : start + head], "big")
        return (start + head, start + head + size) if have >= head + size else None
