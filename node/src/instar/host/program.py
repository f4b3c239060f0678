"""Which program this process runs from, and how it starts its own other entries."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

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


def running_program(argv0: str) -> Program:
    """The program that the interpreter was given. The links on the way are resolved once, here.

    Raises OSError or InstarError when it cannot be read.
    """
    path = Path(argv0).resolve(strict=True)
    release = path.parent.name if path.parent.parent.name == "releases" else ""
    return Program(VERSION, program_digest(path.read_bytes()), path, release)
