"""The local API's client side: one JSON object a line over a Unix socket, with a bound on the wait."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from instar.core.errors import InputError, MachineError

MOST_BYTES = 65_536  # of one line


def ask(path: Path, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Send one request, return its answer.

    Raises MachineError `no-answer` when nobody listens, or nothing comes within `timeout_s`;
    InputError with the daemon's own code when it says no.
    """
    end = time.monotonic() + timeout_s
    line = b""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            connection.sendall(json.dumps({"v": 1, **request}).encode() + b"\n")
            while not line.endswith(b"\n") and len(line) <= MOST_BYTES:
                connection.settimeout(max(0.001, end - time.monotonic()))
                chunk = connection.recv(16_384)
                if not chunk:
                    raise ConnectionError("it closed the connection before it had answered")
                line += chunk
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise ValueError("the answer is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise MachineError("no-answer", f"cannot ask {path.name}: {str(error) or 'no answer'}") from None
    if not answer.get("ok"):
        said = answer.get("error")
        fault = said if isinstance(said, dict) else {}
        raise InputError(str(fault.get("code", "refused")), str(fault.get("text", "it said no")))
    return answer
