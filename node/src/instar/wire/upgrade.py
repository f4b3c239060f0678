"""The client's side of the HTTP upgrade to a WebSocket (RFC 6455, section 4.1), without I/O.

The order that must hold in `Answer.feed`: size of the head, its form, the status, and only for a 101 the
fields that prove that a WebSocket server answered this very request.
"""

from __future__ import annotations

import hashlib
from binascii import b2a_base64

from instar.core.errors import InputError

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
MOST_HEAD = 16_384  # bytes of status line and fields, of all interim answers together
END = b"\r\n\r\n"
TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


def request(host: str, target: str, headers: dict[str, str], key: bytes) -> bytes:
    """The request that asks for the upgrade. `key` is 16 random bytes."""
    lines = [
        f"GET {target} HTTP/1.1",
        f"Host: {host}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {_base64(key)}",
        "Sec-WebSocket-Version: 13",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def accept_value(key: bytes) -> str:
    """What `Sec-WebSocket-Accept` must say.

    >>> accept_value(b"the sample nonce")
    's3pPLMBiTxaQ9kYGzzhZRbK+xOo='
    """
    return _base64(hashlib.sha1(_base64(key).encode() + GUID, usedforsecurity=False).digest())


class Answer:
    """The server's answer, fed piece by piece. `status` is 0 until its head is whole."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._raw = bytearray()
        self._read = 0  # bytes of interim answers
        self.status = 0
        self.fields: dict[str, str] = {}  # names in small letters; those of one name joined by ', '

    def feed(self, data: bytes) -> bytes:
        """Take `data` in. Once `status` is set: what followed the head; before that b"".

        Raises InputError `bad-upgrade` for what is no HTTP, and for a 101 that is no upgrade to a WebSocket.
        """
        self._raw += data
        while True:
            end = self._raw.find(END)
            if self._read + (end if end >= 0 else len(self._raw)) > MOST_HEAD:
                raise _cannot(f"a head of at most {MOST_HEAD} bytes", "more")
            if end < 0:
                return b""
            status, fields = _head(bytes(self._raw[:end]))
            rest = bytes(self._raw[end + len(END) :])
            if status == 101 or status >= 200:
                break
            self._read += end  # an interim answer, such as 103: the real one follows
            self._raw[:] = rest
        if status == 101:
            _check(fields, self._key)
        self.status, self.fields = status, fields
        self._raw.clear()
        return rest


def _head(raw: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = raw.split(b"\r\n")
    words = first.split(b" ", 2)
    if words[0] != b"HTTP/1.1" or len(words) < 2 or len(words[1]) != 3 or not words[1].isdigit():
        raise _cannot("HTTP/1.1 and a status", ascii(first[:40]))
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not name or not colon or not TOKEN.issuperset(name):
            raise _cannot("fields of the form 'name: value'", ascii(line[:40]))
        known, said = name.decode("ascii").lower(), value.strip(b" \t").decode("latin-1")
        fields[known] = f"{fields[known]}, {said}" if known in fields else said
    return int(words[1]), fields


def _check(fields: dict[str, str], key: bytes) -> None:
    if fields.get("upgrade", "").lower() != "websocket":
        raise _cannot("'Upgrade: websocket'", ascii(fields.get("upgrade", "none"))[:40])
    options = [word.strip().lower() for word in fields.get("connection", "").split(",")]
    if "upgrade" not in options:
        raise _cannot("'Connection: Upgrade'", ascii(fields.get("connection", "none"))[:40])
    if fields.get("sec-websocket-accept") != accept_value(key):
        raise _cannot("the proof that our request was read", "another one")
    for name in ("sec-websocket-extensions", "sec-websocket-protocol"):
        if name in fields:  # it would change what the frames mean, and we asked for none
            raise _cannot(f"no '{name}'", ascii(fields[name])[:40])


def _base64(data: bytes) -> str:
    return b2a_base64(data, newline=False).decode("ascii")


def _cannot(expected: str, got: str) -> InputError:
    return InputError("bad-upgrade", f"cannot open the channel: expected {expected}, got {got}")
