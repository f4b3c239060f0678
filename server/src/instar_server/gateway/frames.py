"""Text frames and messages: the node's dataclasses, decoded by msgspec.

A frame that cannot be used raises FrameError, which becomes an `error` frame; the connection stays.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgspec

from instar.wire.messages import BY_TYPE, MAX_FRAME, Message

FROM_NODE = frozenset(
    {
        "hello", "taken", "output", "result", "command-status", "health", "ping", "pong", "error",
        "update-have", "update-ack", "update-state", "agentupdate-progress", "agentupdatedownloaded",
        "agentupdate-ended",
    }
)  # fmt: skip


class FrameError(Exception):
    """What is wrong with a frame, with a stable code."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


class _Kind(msgspec.Struct):
    t: str


_KIND = msgspec.json.Decoder(_Kind)
_DECODERS = {name: msgspec.json.Decoder(BY_TYPE[name]) for name in FROM_NODE}
_FIELDS = {cls: tuple(field.name for field in fields(cls)) for cls in BY_TYPE.values()}
_ENCODER = msgspec.json.Encoder()


def decode(data: bytes) -> Message:
    """The message in a frame from a node. Raises FrameError."""
    if len(data) > MAX_FRAME:
        raise FrameError(
            "frame-too-large", f"cannot read the frame: expected at most {MAX_FRAME} bytes, got {len(data)}"
        )
    try:
        kind = _KIND.decode(data).t
        decoder = _DECODERS.get(kind)
        if decoder is None:
            known = "unexpected-type" if kind in BY_TYPE else "unknown-type"
            raise FrameError(known, f"cannot use a frame of type {kind[:40]!r} here")
        return decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise FrameError("bad-frame", f"cannot read the frame: {str(error)[:300]}") from None


def encode(message: Message) -> str:
    body: dict[str, Any] = {"t": message.T}
    for name in _FIELDS[type(message)]:
        body[name] = getattr(message, name)
    return _ENCODER.encode(body).decode()
