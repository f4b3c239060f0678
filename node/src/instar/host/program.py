"""Which program this process runs from, and how it starts its own other entries."""

from __future__ import annotations

import _thread
from pathlib import Path
from typing import NamedTuple

from instar.core.errors import InstarError
from instar.host import interpreter
from instar.trust.program import program_digest
from instar.version import VERSION


class Program(NamedTuple):
    """`release` is the name of the release folder it lies in, '' when it lies in none."""

    version: str
    digest: str  # program digest, SHA-384
    path: Path
    release: str

    def command(self, entry: str, *args: str) -> list[str]:
        """The command line that starts `entry` of this very program."""
        return interpreter.command(self.path, entry, *args)

    def header(self, role: str) -> str:
        """The value of `Instar-Program` (docs/protocol.md)."""
        return f"{role} {self.version} {self.digest}"


class _Reader:
    """Reads and digests one file, in a thread of its own: neither needs the interpreter."""

    def __init__(self, path: Path) -> None:
        self.path, self.digest = path, ""
        self._done = _thread.allocate_lock()  # held until it is through
        self._done.acquire()
        _thread.start_new_thread(self._run, ())

    def _run(self) -> None:
        try:
            self.digest = program_digest(self.path.read_bytes())
        except (OSError, InstarError):
            pass  # whoever asks reads it again, and is told why
        finally:
            self._done.release()

    def wait(self) -> str:
        """The digest, or '' when it cannot be had. Bounded by the reading of one file."""
        with self._done:
            return self.digest


_ahead: _Reader | None = None


def read_ahead(argv0: str) -> None:
    """Begin to digest the running program, before the rest of it is imported: 5 of the milliseconds of an
    update's gap. No error of it is told here."""
    global _ahead
    try:
        _ahead = _Reader(Path(argv0).resolve(strict=True))
    except (OSError, RuntimeError):
        return


def running_program(argv0: str) -> Program:
    """The program that the interpreter was given. The links on the way are resolved once, here.

    Raises OSError or InstarError when it cannot be read.
    """
    path = Path(argv0).resolve(strict=True)
    release = path.parent.name if path.parent.parent.name == "releases" else ""
    digest = _ahead.wait() if _ahead is not None and _ahead.path == path else ""
    return Program(VERSION, digest or program_digest(path.read_bytes()), path, release)
