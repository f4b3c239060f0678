"""The modules that ride in the program. `BUILT_IN` is all that a job can name; nothing is looked up by path.

A module has `run(args, context)` and returns its reply, an object of JSON values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from instar.trust.program import program_digest

BUILT_IN = ("selftest",)


@dataclass(frozen=True, slots=True)
class Context:
    """What a module may know about where it runs."""

    program: Path  # the file that this runner process was started from
    version: str

    def digest(self) -> str:
        """The program digest, computed now from the file. Raises OSError or InputError."""
        return program_digest(self.program.read_bytes())
