"""The blocking side of a runner's control line: one request, its lines, one answer. Bounded in time and bytes.

The agent has its own, which does not block; the updater uses this one for the rehearsal of a module.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

from instar.core.errors import MachineError
from instar.host.children import Ended
from instar.host.marks import Mark
from instar.host.processes import wait_gone

MOST_LINE = 262_144  # bytes
MOST_BYTES = 4 << 20  # of all lines together
STDERR_TAIL = 16_384
MARKS = 1 << 34  # above the numbers of the agents' runs; the pid makes it one of its own
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Descriptor 3 is where a runner looks; what starts it here can only place 0, 1 and 2.
PLACE = ["/bin/sh", "-c", 'exec "$@" 3<&0 0</dev/null', "sh"]


class Talk(NamedTuple):
    """How a runner ended, and its last answer; None when it gave none. `cut`: it was ended for too much output."""

    ended: Ended
    answer: dict[str, Any] | None
    cut: bool


def talk(command: list[str], request: dict[str, Any], cwd: Path, module: str, within_s: float) -> Talk:
    """Start a runner, give it `request`, heed what it says until it ends, or end it after `within_s`.

    Nothing of it is left when this returns, not even what left its session. Raises MachineError `cannot-run`.
    """
    home = {"HOME": str(cwd), "TMPDIR": str(cwd)}
    environment = {"PATH": PATH, "LANG": "C.UTF-8", **home, "INSTAR_MODULE": module}
    started = time.monotonic()
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            child = _start([*PLACE, *command], theirs, cwd, environment)
        pidfd, mark = os.pidfd_open(child.pid), Mark(MARKS + child.pid)
        reader = _Reader(ours, child)
        try:
            with contextlib.suppress(OSError):
                mark.put(child.pid)  # before it knows what to run
            reader.say(json.dumps(request).encode() + b"\n", started + within_s)
            reader.run(started + within_s)
            late = not wait_gone(
                pidfd, 0.0 if reader.cut else max(0.0, started + within_s - time.monotonic())
            )
        finally:
            os.close(pidfd)
            # Not reaped yet, so the group's number is still the child's, and no stranger is hit.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            mark.kill()
            child.wait()
            reader.close()
    stderr = reader.stderr.decode(errors="replace")
    seconds = time.monotonic() - started
    return Talk(
        Ended(child.returncode, b"", stderr, seconds, late and not reader.cut), reader.answer, reader.cut
    )


def _start(
    command: list[str], line: socket.socket, cwd: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            stdin=line.fileno(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise MachineError("cannot-run", f"cannot run {command[len(PLACE)]}: {error}") from None


class _Reader:
    """Both of a runner's outputs, until they close."""

    def __init__(self, line: socket.socket, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        self._line, self._out = line, child.stdout
        self._rest, self._seen = b"", 0
        self.stderr = bytearray()
        self.answer: dict[str, Any] | None = None
        self.cut = False

    def say(self, data: bytes, end: float) -> None:
        self._line.settimeout(max(0.001, end - time.monotonic()))
        with contextlib.suppress(OSError):  # it ended first, and its words say why
            self._line.sendall(data)

    def run(self, end: float) -> None:
        with selectors.DefaultSelector() as selector:
            for source in (self._line, self._out):
                os.set_blocking(source.fileno(), False)
                selector.register(source, selectors.EVENT_READ)
            while selector.get_map() and not self.cut and (left := end - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    if not self._pull(key.fileobj is self._line):
                        selector.unregister(key.fileobj)

    def close(self) -> None:
        self._out.close()

    def _pull(self, line: bool) -> bool:
        try:
            chunk = os.read((self._line if line else self._out).fileno(), 65_536)
        except BlockingIOError:
            return True
        except OSError:
            return False  # the other end is gone with what we sent unread
        if line:
            self._heed(chunk)
        else:
            self.stderr += chunk
            del self.stderr[:-STDERR_TAIL]
        return bool(chunk)

    def _heed(self, chunk: bytes) -> None:
        self._seen += len(chunk)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        self.cut = self._seen > MOST_BYTES or any(len(part) > MOST_LINE for part in (*lines, self._rest))
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                said = json.loads(line)
                if isinstance(said, dict) and isinstance(said.get("ok"), bool):
                    self.answer = said
