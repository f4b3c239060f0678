"""Clients that mean no good: mutated bytes, raw connections to a gateway, and a look at what a process holds."""

from __future__ import annotations

import json
import os
import random
import socket
import ssl
from pathlib import Path
from typing import Any

from instar_lab import machine
from instar_lab.node import Node
from instar_lab.sim.frames import TEXT, frame, upgrade

DIGEST = "ab" * 48


def samples(node: str) -> dict[str, dict[str, Any]]:
    """One good frame of every type."""
    hello = {
        "t": "hello", "v": 1, "role": "agent", "node": node, "version": "1.0.0", "digest": DIGEST,
        "boot_id": "b", "pid": 1, "started": 1.5, "tx": "", "os": "linux", "arch": "x", "python": "3.11.0",
        "features": ["jobs"],
    }  # fmt: skip
    result = {
        "t": "result",
        "id": "j-1",
        "ok": True,
        "reply": {"nonce": "0" * 32},
        "exit_code": 0,
        "stderr": "é",
    }
    return {
        "hello": hello,
        "welcome": {"t": "welcome", "v": 1, "server": "1.0.0", "ping_s": 30.0, "health_s": 60.0},
        "look": {"t": "look", "reason": "why not"},
        "job": {"t": "job", "id": "j-1", "module": "selftest", "args": {"nonce": "00"}, "deadline_s": 3.0},
        "result": result,
        "ack": {"t": "ack", "id": "j-1"},
        "health": {"t": "health", "ok": True, "modules": {"m": "ok"}, "facts": {"uptime_s": 1.5}},
        "ping": {"t": "ping", "n": 7},
        "pong": {"t": "pong", "n": 7},
        "refused": {"t": "refused", "code": "revoked", "message": "go", "retry_after_s": 5.0},
        "error": {"t": "error", "code": "bad-frame", "message": "what?"},
    }


STRANGE: tuple[Any, ...] = (
    None, True, -1, 2**63, 10**400, 1e308, "", "\u0000", "../../etc/passwd", "x" * 5000, [], {}, [[[]]], {"a": None},
)  # fmt: skip


def mutated(body: dict[str, Any], chance: random.Random) -> bytes:
    """`body` as JSON with one thing wrong: a field's value, its name, or some of the bytes."""
    body = dict(body)
    kind = chance.randrange(6)
    name = chance.choice(list(body))
    if kind == 0:
        body[name] = chance.choice(STRANGE)
    elif kind == 1:
        body[name[::-1] + "\n"] = body.pop(name)
    elif kind == 2:
        body[f"new-{chance.random()}"] = chance.choice(STRANGE)
    elif kind == 3:
        body["t" if "t" in body else "do"] = chance.choice(STRANGE)
    data = bytearray(json.dumps(body).encode())
    if kind == 4:
        del data[chance.randrange(len(data)) :]
    elif kind == 5:
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


class Stranger:
    """A raw TLS connection to the gateway with a node's identity. One thread: what came is read when asked for."""

    def __init__(self, node: Node, gateway: tuple[str, int]) -> None:
        context = ssl.create_default_context(cafile=str(node.layout.ca))
        context.load_cert_chain(node.layout.certificate, node.layout.key)
        raw = socket.create_connection(gateway, timeout=60)
        self.socket = context.wrap_socket(raw, server_hostname=gateway[0])
        self._heard = b""
        self._ended = False

    @property
    def heard(self) -> bytes:
        """The newest bytes that came."""
        self._read()
        return self._heard

    @property
    def ended(self) -> bool:
        self._read()
        return self._ended

    def _read(self) -> None:
        try:
            self.socket.settimeout(0)
            while not self._ended:
                data = self.socket.recv(65_536)
                self._heard = (self._heard + data)[-200_000:]
                self._ended = not data
        except ssl.SSLWantReadError:
            return
        except (OSError, ValueError):
            self._ended = True

    def channel(self, place: str) -> None:
        self.send(upgrade(place, "/v1/channel", os.urandom(16), {}))

    def send(self, data: bytes) -> bool:
        """False when the connection has ended."""
        try:
            self.socket.settimeout(60)
            self.socket.sendall(data)
        except (OSError, ValueError):
            self._ended = True
        return not self.ended

    def answered(self, within_s: float) -> None:
        """Wait until something came back, or the connection has ended."""
        machine.wait_for(lambda: self.heard or self.ended, "an answer, or the end", within_s)

    def text(self, data: bytes) -> bool:
        return self.send(frame(TEXT, data))

    def close(self) -> None:
        self.socket.close()


def held(pid: int) -> tuple[int, int]:
    """(resident bytes, open descriptors) of a process."""
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir(f"/proc/{pid}/fd"))
