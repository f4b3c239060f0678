"""The outer end of the guest's hands.py: have a machine do something, and hear what came of it.

Over a port that is no network, so that a test may look at a guest whose network it has cut.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from pathlib import Path
from typing import Any

from instar.core.errors import MachineError

SLACK_S = 30.0  # until the answer is here, over what the guest itself waits


class Hands:
    """`path` is the socket that QEMU listens at; at most 107 bytes long."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket: socket.socket | None = None
        self._left = b""
        self._count = 0

    def device(self) -> list[str]:
        """QEMU's words."""
        self.path.unlink(missing_ok=True)
        return [
            "-chardev", f"socket,id=hands,path={self.path},server=on,wait=off",
            "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=hands,name=instar-lab",
        ]  # fmt: skip

    def do(self, script: str, within_s: float) -> str:
        """Raises MachineError `guest-failed`, `not-seen`."""
        self._count += 1
        end = time.monotonic() + within_s + SLACK_S
        ask = {"id": self._count, "run": script, "within_s": within_s}
        try:
            self._connected().sendall(json.dumps(ask).encode() + b"\n")
            while (answer := self._next(end)).get("id") != self._count:
                pass
        except OSError as error:
            self.close()
            raise MachineError("not-seen", f"cannot {script[:80]!r} in the guest: {error}") from None
        if answer["status"] != 0:
            text = f"cannot {script[:80]!r} in the guest: status {answer['status']}: {answer['said'][-2000:]}"
            raise MachineError("guest-failed", text)
        return str(answer["said"])

    def _connected(self) -> socket.socket:
        if self._socket is None:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self.path))
            except OSError:
                connection.close()
                raise
            self._socket, self._left = connection, b""
        return self._socket

    def _next(self, end: float) -> dict[str, Any]:
        """The next line that is one of ours; a reset may have cut one in two."""
        connection = self._connected()
        while True:
            line, found, rest = self._left.partition(b"\n")
            if found:
                self._left = rest
                with contextlib.suppress(ValueError):
                    return dict(json.loads(line))
                continue
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError("no answer")
            connection.settimeout(left)
            data = connection.recv(65_536)
            if not data:
                raise ConnectionError("the machine is off")
            self._left += data

    def close(self) -> None:
        """Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
