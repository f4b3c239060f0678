"""Frames of a WebSocket (RFC 6455, section 5) as a client reads and writes them. Bytes in, parts out.

    0                   1                   2                   3
    FIN RSV RSV RSV  opcode(4)  MASK  length(7)  [length(16 or 64)]  [mask(32)]  payload

A frame is never held as a whole here: its header comes first, then its payload in the pieces in which it
arrived, so that the caller bounds what is kept. Only control frames (at most 125 bytes) come in one piece.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from instar.core.errors import InputError

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
OPCODES = (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG)
FIN, RSV, MASKED, CONTROL = 0x80, 0x70, 0x80, 0x8
MOST_CONTROL = 125  # bytes of a control frame's payload


class Header(NamedTuple):
    """A data frame begins: `size` bytes of payload follow."""

    opcode: int
    final: bool
    size: int


class Payload(NamedTuple):
    """More of the present data frame; `last` ends it."""

    data: bytes
    last: bool


class Control(NamedTuple):
    """A whole control frame; it may stand between the frames of a message."""

    opcode: int
    data: bytes


Part = Header | Payload | Control


class Parser:
    """Reads what a server sends: unmasked, without extensions."""

    def __init__(self) -> None:
        self._raw = bytearray()
        self._left = 0  # bytes of the present data frame that are still to come

    def feed(self, data: bytes) -> None:
        self._raw += data

    def next(self) -> Part | None:
        """The next part; None when more bytes are needed. Raises InputError `bad-frame`."""
        if self._left:
            return self._payload() if self._raw else None
        found = _header(self._raw)
        if found is None:
            return None
        header, length = found
        if not header.opcode & CONTROL:
            del self._raw[:length]
            self._left = header.size
            return header
        if len(self._raw) < length + header.size:
            return None
        control = Control(header.opcode, bytes(self._raw[length : length + header.size]))
        del self._raw[: length + header.size]
        return control

    def _payload(self) -> Payload:
        piece = bytes(self._raw[: self._left])
        del self._raw[: len(piece)]
        self._left -= len(piece)
        return Payload(piece, self._left == 0)


def _header(raw: bytearray) -> tuple[Header, int] | None:
    """The header at the start of `raw` and its length in bytes."""
    if len(raw) < 2:
        return None
    opcode, final, size, length = raw[0] & 0xF, bool(raw[0] & FIN), raw[1] & 0x7F, 2
    if raw[0] & RSV:
        raise _cannot("no extension", f"first byte {raw[0]:#x}")
    if opcode not in OPCODES:
        raise _cannot("an opcode of RFC 6455", f"{opcode:#x}")
    if raw[1] & MASKED:
        raise _cannot("an unmasked frame", "a masked one")
    if opcode & CONTROL and (size > MOST_CONTROL or not final):
        raise _cannot(f"a control frame of at most {MOST_CONTROL} bytes", "a longer or divided one")
    if size > MOST_CONTROL:
        form, least = ("!H", MOST_CONTROL + 1) if size == 126 else ("!Q", 1 << 16)
        length += struct.calcsize(form)
        if len(raw) < length:
            return None
        size = struct.unpack_from(form, raw, 2)[0]
        if size < least or size >= 1 << 63:
            raise _cannot("a length in its shortest form", f"{size}")
    return Header(opcode, final, size), length


def masked(opcode: int, payload: bytes, mask: bytes) -> bytes:
    """One whole frame as a client sends it. `mask` is four random bytes, new for each frame."""
    size = len(payload)
    if size <= MOST_CONTROL:
        head = struct.pack("!BB", FIN | opcode, MASKED | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", FIN | opcode, MASKED | 126, size)
    else:
        head = struct.pack("!BBQ", FIN | opcode, MASKED | 127, size)
    return head + mask + _xor(payload, mask)


def _xor(payload: bytes, mask: bytes) -> bytes:
    """`payload` XOR the repeated mask, as two large numbers: 40 times as fast as byte by byte."""
    size = len(payload)
    stream = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(stream, "big")).to_bytes(size, "big")


def _cannot(expected: str, got: str) -> InputError:
    return InputError("bad-frame", f"cannot read WebSocket: expected {expected}, got {got}")
