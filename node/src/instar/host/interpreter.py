"""How a program of ours is started: one command line for every entry."""

from __future__ import annotations

import sys
from pathlib import Path

# Isolated, without site-packages; without column numbers in tracebacks, which cost memory in every process.
FLAGS = ("-I", "-S", "-X", "no_debug_ranges")


def command(program: Path, entry: str, *arguments: str) -> list[str]:
    """The command line that starts `entry` of `program` with the interpreter that runs this process."""
    return [sys.executable, *FLAGS, str(program), entry, *arguments]
