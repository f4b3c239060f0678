"""A real node in a scratch folder: installed, started by hand (`--service none`), looked at from outside."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instar.core.errors import InstarError, MachineError
from instar.host.layout import LINES, Layout
from instar.trust.program import program_digest
from instar_lab import machine

COMMAND_S = 60.0
DOUBLE_S = 3.0  # from fork to exec takes a child milliseconds, on a busy machine tens of them
# Nodes of one machine would compete for the one default port, and the others would log that it is taken.
NO_WAKE_PORT = "\n[wake]\nport = 0\n"
NO_API = 'api = ""\n'  # the same for the updater's API; its Unix socket stays
LONGEST_STATE = 80  # bytes: a Unix socket's address has 107, and the sockets lie below the state folder


@dataclass(frozen=True, slots=True)
class Running:
    """A resident process of a node: what runs, by the bytes of its program file."""

    role: str
    pid: int
    program: Path
    digest: str


class Node:
    """`state` is the node's state folder; it must be short enough for the sockets below it."""

    def __init__(self, state: Path) -> None:
        if len(str(state)) > LONGEST_STATE:
            raise MachineError(
                "path-too-long", f"cannot install below {state}: expected at most {LONGEST_STATE} bytes"
            )
        self.state = state
        self.layout = Layout(state)
        self.name = state.name

    @property
    def id(self) -> str:
        """The node's id; '' before it has enrolled."""
        try:
            return str(json.loads(self.layout.node.read_bytes())["node"])
        except (OSError, ValueError, KeyError):
            return ""

    # --- doing

    def install(self, program: Path, settings: str = "", start: bool = True, service: str = "none") -> None:
        """Install `program`, which holds its configuration, and start it. Raises MachineError.

        `settings` are written to config.toml between the two. Without a [wake] in them there is no wake-up port,
        without an `api` no API over TCP. `service` is who keeps it running, as `instar install --service` takes it.
        """
        self._run(program, ["install", "--state", str(self.state), "--service", service, "--no-start"])
        self.layout.config.write_text(quietly(settings))
        if start:
            self.cli("start")

    def cli(self, *words: str) -> str:
        """Run the node's own command line, as a person on the node would."""
        return self._run(self.layout.launcher, [*words, "--state", str(self.state)])

    def _run(self, program: Path, words: list[str]) -> str:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", str(program), *words],
                capture_output=True, text=True, timeout=COMMAND_S, check=False, stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us: what was begun is done or undone first
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise MachineError(
                "too-late", f"cannot {words[0]} {self.name}: no end within {COMMAND_S:g} s"
            ) from error
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip() or "it said nothing")[-2000:]
            raise MachineError(
                "command-failed", f"cannot {words[0]} {self.name}: status {done.returncode}: {said}"
            )
        return done.stdout

    def end(self, grace_s: float = 3.0) -> int:
        """End every process of this node, whatever it is. Returns how many there were."""
        return machine.end_all_naming(self.state, grace_s)

    # --- looking

    def history(self) -> list[dict[str, Any]]:
        """`instar history --json`: the transactions that happened here, oldest first."""
        return list(json.loads(self.cli("history", "--json"))["transactions"])

    def running(self) -> list[Running]:
        """The resident processes by /proc; rehearsals and one-shot helpers are not among them."""
        found = []
        for seen in machine.naming(self.state):
            role = self._role(seen.words)
            if role is not None:
                program = Path(seen.words[seen.words.index(role) - 1])
                found.append(Running(role, seen.pid, program, digest_of(program)))
        return found

    def _role(self, words: tuple[str, ...]) -> str | None:
        """The role that a command line plays: `… instar.pyz agent --state DIR`."""
        for before, word, option in zip(words, words[1:], words[2:], strict=False):
            if (
                before.endswith(".pyz")
                and word in LINES
                and option == "--state"
                and "--rehearse" not in words
            ):
                return word
        return None

    def digests(self) -> dict[str, str]:
        """Role -> program digest of what runs. Raises MachineError when a role is played twice.

        A child shows its parent's command line until it executes a program of its own, so two count as two when
        there were two at every look during DOUBLE_S.
        """
        deadline, seen = time.monotonic() + DOUBLE_S, self.running()
        while twice := _twice(seen):
            if time.monotonic() >= deadline:
                raise MachineError("two-of-a-role", f"{self.name} runs two processes as {twice}")
            machine.pause(0.02)
            seen = self.running()
        return {running.role: running.digest for running in seen}

    def pid(self, role: str) -> int | None:
        """Not that of a child which shows its parent's command line until it executes a program of its own."""
        found = [running.pid for running in self.running() if running.role == role]
        return next((pid for pid in found if machine.parent(pid) not in found), None)

    def logs(self, lines: int = 12) -> str:
        """The ends of this node's logs, for an error message."""
        paths = sorted(self.layout.run.glob("*.log"))
        return "\n".join(f"--- {self.name} {path.name}\n{machine.tail(path, lines)}" for path in paths)


def _twice(seen: list[Running]) -> str:
    """A role that more than one process plays; '' when there is none."""
    roles = [running.role for running in seen]
    return next((role for role in roles if roles.count(role) > 1), "")


def quietly(settings: str) -> str:
    """`settings` with no port opened that they do not name."""
    if not re.search(r"^api\s*=", settings, re.MULTILINE):
        table = "[updater]\n"
        settings = settings if table in settings else f"{settings}\n{table}"
        settings = settings.replace(table, table + NO_API, 1)
    return settings if "[wake]" in settings else settings + NO_WAKE_PORT


def digest_of(program: Path) -> str:
    """The program digest of a file; '' when it is gone or no program."""
    try:
        return program_digest(program.read_bytes())
    except (OSError, InstarError):
        return ""
