"""What all ways to keep a daemon running have in common."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Protocol

from instar.core.errors import MachineError
from instar.host import processes
from instar.host.clock import Clock
from instar.host.layout import Layout
from instar.host.locks import RoleLock

GRACE_S = 10.0  # between TERM and KILL: an agent ends its modules first; the units say the same
CALL_S = 60.0
LEFT_S = 0.2  # for a process that its manager has ended: it need only be reaped

# What a manager's program finds of ours: no settings of whoever started us, which may be another manager.
KEPT = ("PATH", "LANG", "LC_ALL", "TERM")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # a daemon's own may lack the sbin ones


class NoAnswerError(MachineError):
    """A manager's program did not come to its end in time: what it would have said is not known."""


class Services(Protocol):
    """Idempotent. Each call is bounded, and raises MachineError when it cannot be done."""

    name: str

    def restart(self, role: str) -> None:
        """End the process that plays `role`, if any; a new one is being started when this returns."""

    def stop(self, role: str) -> None:
        """End `role` and keep it ended."""

    def start(self, role: str) -> None:
        """See that `role` runs, or is being started."""


class Manager:
    """Base of those whose manager looks after each role by itself, under the name `instar-<role>`.

    What the manager says is not believed: the old process is looked at, and ended if it is still there.
    """

    name = ""

    def __init__(self, layout: Layout, clock: Clock) -> None:
        self.layout, self.clock = layout, clock

    def recorded(self, role: str) -> processes.Process | None:
        return processes.recorded(self.layout.process(role))

    def strays(self, role: str) -> list[processes.Process]:
        """Who plays `role` for this state folder without being recorded (host/strays.py)."""
        from instar.host import strays  # late: a resident agent need not carry it

        return strays.find(self.layout, role, self.clock.boot_id())

    def end_strays(self, role: str) -> None:
        """End them, and prove that they are gone. Before anything is started: one that starts has no record
        yet, and would be taken for a stray. Raises MachineError `not-gone`."""
        from instar.host import strays

        if found := self.strays(role):
            strays.end(found, self.clock.boot_id(), GRACE_S)

    def end(self, process: processes.Process | None, grace_s: float = GRACE_S) -> None:
        """Prove that it is gone. Raises MachineError `not-gone`."""
        if process is not None:
            processes.stop(process, self.clock.boot_id(), grace_s)


class RoleLockProbe:
    """Asks whether somebody holds a role's lock, without keeping it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def held(self) -> bool:
        lock = RoleLock(self.path)
        if lock.try_acquire():
            lock.release()
            return False
        return True


def search_path() -> str:
    """Where a manager's programs are looked for: our own PATH, and then where every system has them."""
    return f"{os.environ.get('PATH', '')}:{PATH}".strip(":")


def call(words: list[str], doing: str, within_s: float = CALL_S, good: tuple[int, ...] = (0,)) -> str:
    """Run a manager's program to its end; what it said.

    Raises MachineError `<program>-failed`: 'cannot <doing>: …' with its last words, or with the way out
    where the program is not there; NoAnswerError when it takes too long.
    """
    code = f"{Path(words[0]).name}-failed"
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=within_s,
            check=False,
            cwd="/",
            env={**environment, "PATH": search_path()},
        )
    except FileNotFoundError:
        way_out = "install it, or `instar install` with another --service"
        text = f"cannot {doing}: {words[0]} is not on this machine; {way_out}"
        raise MachineError(code, text) from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(code, f"cannot {doing}: {words[0]} had no answer within {within_s:g} s") from None
    except OSError as error:
        raise MachineError(code, f"cannot {doing}: {words[0]}: {error.strerror}") from None
    said = done.stdout.decode(errors="replace").strip()
    if done.returncode not in good:
        last = said[-500:] or "it said nothing"
        raise MachineError(
            code, f"cannot {doing}: {' '.join(words)} ended with status {done.returncode}: {last}"
        )
    return said
