"""What the lab sees of processes on this machine, from /proc: no program can talk its way around that."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from instar.core.errors import MachineError

T = TypeVar("T")
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Seen:
    """A process as /proc shows it."""

    pid: int
    words: tuple[str, ...]  # its command line


def processes() -> list[Seen]:
    """Every living process that has a command line."""
    numbers = (int(name) for name in os.listdir("/proc") if name.isdecimal())
    return [Seen(number, words) for number in numbers if (words := command_line(number))]


def command_line(pid: int) -> tuple[str, ...]:
    """Empty when there is no such process, or it is a zombie or the kernel's own."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(os.fsdecode(word) for word in raw.split(b"\0")[:-1])


def naming(path: Path) -> list[Seen]:
    """Instar's processes that work below `path`: they run a program there, or have it as --state or --data.

    Nobody else is among them: not an editor with a log open, not the shell that started this.
    """
    return [seen for seen in processes() if works_below(seen.words, str(path))]


def works_below(words: tuple[str, ...], path: str) -> bool:
    return any(
        (word == path or word.startswith(f"{path}/"))
        and (word.endswith("/instar.pyz") or before in ("--state", "--data"))
        for before, word in pairwise(words)
    )


def end_all_naming(path: Path, grace_s: float) -> int:
    """End every process that works below `path`: TERM, then KILL after `grace_s`. Returns how many it was.

    Repeats until none is left: a keeper may start a new one while the old ones are ended.
    """
    ended: set[int] = set()
    deadline = time.monotonic() + grace_s
    while found := naming(path):
        hard = time.monotonic() >= deadline
        for seen in found:
            signal_process(seen, signal.SIGKILL if hard else signal.SIGTERM)
            ended.add(seen.pid)
        if time.monotonic() >= deadline + 10.0:
            raise MachineError("not-gone", f"cannot end {len(found)} processes below {path}")
        pause(0.05 if hard else 0.1)
    return len(ended)


def signal_process(seen: Seen, number: signal.Signals) -> None:
    """Send a signal through a pidfd, so that it cannot reach another process that got the same pid."""
    try:
        pidfd = os.pidfd_open(seen.pid)
    except ProcessLookupError:
        return
    try:
        if command_line(seen.pid) == seen.words:
            signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)


def wait_gone(pid: int, within_s: float) -> bool:
    """Whether the process has ended within that time."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], within_s)[0])
    finally:
        os.close(pidfd)


def parent(pid: int) -> int:
    """0 when there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def rss(pid: int) -> int:
    """Resident memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, its waited-for children not included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on, for who has to name one before it is bound.

    Not one of those that the kernel gives to whoever asks for any: those are gone before it is used, now and then.
    """
    ports, chance = range(20_000, 32_000), random.SystemRandom()
    for _ in range(100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port := chance.choice(ports)))
            return port
    raise MachineError("no-port", f"cannot find a free port: tried 100 of {ports.start} to {ports.stop}")


def pause(seconds: float) -> None:
    """Wait; an interrupt (Ctrl-C) ends it at once."""
    time.sleep(seconds)


def wait_for(
    look: Callable[[], T | None],
    what: str,
    within_s: float,
    got: Callable[[], str] = lambda: "",
    every_s: float = 0.1,
) -> T:
    """Look again and again until the answer is true.

    Raises MachineError `too-late` after `within_s`; `got` then says what there is instead.
    """
    deadline = time.monotonic() + within_s
    while True:
        if found := look():
            return found
        if time.monotonic() >= deadline:
            instead = got()
            raise MachineError(
                "too-late",
                f"cannot go on: expected {what} within {within_s:g} s"
                + (f", got {instead}" if instead else ""),
            )
        pause(every_s)


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, for an error message."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16_384))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"(cannot read {path.name}: {error.strerror})"
    return "\n".join(text.splitlines()[-lines:])
