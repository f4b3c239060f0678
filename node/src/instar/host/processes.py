"""Processes: told apart by pid *and* start time, signalled through pidfds, proven gone.

A pid alone may be another process by now; the pair (pid, start time) of one boot never is.

The launcher writes records through this, and neither waits nor signals: those imports are in the functions.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from instar.core.errors import MachineError
from instar.core.light import asdict, dataclass
from instar.host.files import failed, remove

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal


@dataclass(frozen=True, slots=True)
class Process:
    """One process of one boot. `started` is field 22 of /proc/<pid>/stat, in clock ticks since boot."""

    pid: int
    started: int
    boot_id: str
    release: str = ""


def start_time(pid: int) -> int | None:
    """When `pid` started, in ticks since boot; None when it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()
    if fields[0] in (b"Z", b"X"):
        return None
    return int(fields[19])


def this_process(boot_id: str, release: str = "") -> Process:
    pid = os.getpid()
    return Process(pid, start_time(pid) or 0, boot_id, release)


def record(path: Path, process: Process) -> None:
    """Write who plays a role. exec keeps pid and start time, so the launcher may write it.

    Whole for every reader, but not synced: it speaks of this boot alone, so after a power cut it would
    say nothing. Two syncs at each start would lengthen the gap of an update. A disk that others filled
    must not keep a node from starting: then the bytes that the old record holds are written over.
    """
    temporary, data = path.with_name(f".{path.name}.new"), json.dumps(asdict(process)).encode()
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            file.write(data)
        os.rename(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not _written_over(path, data):
            raise failed("write", path, error) from error


def _written_over(path: Path, data: bytes) -> bool:
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "wb", buffering=0) as file:
            whole = file.write(data) == len(data)
            file.truncate(len(data))
            return whole
    except OSError:
        return False


def recorded(path: Path) -> Process | None:
    """The recorded process, whether it lives or not; None without a readable record."""
    try:
        fields = json.loads(path.read_bytes())
        pid, started = int(fields["pid"]), int(fields["started"])
        return (
            Process(pid, started, str(fields["boot_id"]), str(fields["release"])) if 0 < pid < 2**31 else None
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def forget(path: Path) -> None:
    remove(path)


def alive(process: Process, boot_id: str) -> bool:
    return process.boot_id == boot_id and start_time(process.pid) == process.started


def open_pidfd(process: Process, boot_id: str) -> int | None:
    """A descriptor for exactly this process; None when it is gone. The caller closes it."""
    if process.boot_id != boot_id:
        return None
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    if start_time(process.pid) != process.started:
        os.close(fd)
        return None
    return fd


def wait_gone(pidfd: int, timeout_s: float) -> bool:
    """Whether the process behind `pidfd` ended within `timeout_s`."""
    import select

    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(max(0, round(timeout_s * 1000))))


def stop(process: Process, boot_id: str, grace_s: float, kill_s: float = 5.0) -> str:
    """End `process`: TERM, wait `grace_s`, KILL, wait `kill_s`. Idempotent.

    Returns 'gone' (it was not there), 'stopped' or 'killed'.
    Raises MachineError `not-gone` when even KILL does not end it (a process stuck in the kernel).
    """
    import signal

    fd = open_pidfd(process, boot_id)
    if fd is None:
        return "gone"
    try:
        _send(fd, signal.SIGTERM)
        if wait_gone(fd, grace_s):
            return "stopped"
        _send(fd, signal.SIGKILL)
        if wait_gone(fd, kill_s):
            return "killed"
    finally:
        os.close(fd)
    raise MachineError("not-gone", f"cannot stop process {process.pid}: it is still there after SIGKILL")


def send(process: Process, boot_id: str, number: signal.Signals) -> bool:
    """Send a signal to exactly this process; whether it was there."""
    fd = open_pidfd(process, boot_id)
    if fd is None:
        return False
    try:
        _send(fd, number)
    finally:
        os.close(fd)
    return True


def _send(pidfd: int, number: signal.Signals) -> None:
    import signal

    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return


def signal_name(number: int) -> str:
    """As `SIGKILL`; the real-time ones between the first and the last have no name."""
    import signal

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
