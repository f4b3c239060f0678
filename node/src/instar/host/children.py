"""One-shot children: bounded in time and output, in a session of their own, ended with all they started."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from instar.core.errors import MachineError
from instar.host.interpreter import command
from instar.host.processes import signal_name, wait_gone

MOST_BYTES = 262_144  # kept of each of stdout and stderr: the head of the first, the tail of the second


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended. `status` as in subprocess: negative for a signal. `late`: killed at its deadline."""

    status: int
    stdout: bytes
    stderr: str
    seconds: float
    late: bool

    @property
    def last_words(self) -> str:
        """The last line of stderr, for a reason."""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        return lines[-1][:500] if lines else ""

    def describe(self, what: str) -> str:
        """One line: what ended, how, and its last words."""
        if self.late:
            how = f"did not end within {self.seconds:.1f} s and was killed"
        elif self.status < 0:
            how = f"was ended by {signal_name(-self.status)}"
        else:
            how = f"ended with status {self.status}"
        return f"{what} {how}" + (f": {self.last_words}" if self.last_words else "")


def run_program(program: Path, arguments: list[str], within_s: float) -> Ended:
    """Run one entry of an Instar program. Raises MachineError `cannot-run` when it cannot be started."""
    return run(command(program, *arguments), within_s)


def run(command: list[str], within_s: float) -> Ended:
    """Run `command` to its end, or kill it and all of its session after `within_s` seconds."""
    started = time.monotonic()
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise MachineError("cannot-run", f"cannot run {command[0]}: {error}") from None
    pidfd = os.pidfd_open(child.pid)
    try:
        out, err = _collect(child, started + within_s)
        late = not wait_gone(pidfd, started + within_s - time.monotonic())
    finally:
        os.close(pidfd)
        # Not reaped yet, so the group's number is still the child's, and no stranger is hit.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for pipe in (child.stdout, child.stderr):
            if pipe is not None:
                pipe.close()
    seconds = time.monotonic() - started
    return Ended(child.returncode, out, err.decode(errors="replace"), seconds, late)


def _collect(child: subprocess.Popen[bytes], end: float) -> tuple[bytes, bytes]:
    """Read both pipes until they close or `end`; more than MOST_BYTES is read and dropped."""
    out, err = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        for pipe, kept in ((child.stdout, out), (child.stderr, err)):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, kept)
        while selector.get_map() and (left := end - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                chunk = os.read(key.fd, 65_536)
                if not chunk:
                    selector.unregister(key.fileobj)
                key.data.extend(chunk)
                if key.data is err:
                    del err[: max(0, len(err) - MOST_BYTES)]
                else:
                    del out[MOST_BYTES:]
    return bytes(out), bytes(err)
