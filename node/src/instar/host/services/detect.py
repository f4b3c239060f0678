"""How the running agent was started (W5), by evidence that only that way leaves behind.

| method | evidence |
|---|---|
| systemd | its cgroup is below instar-agent.service, and systemd is the service manager |
| runit | its parent is runsv |
| supervisor | its parent is supervisord |
| openrc, sysv | our keeper is its parent, or keeps this state folder, and was told `--by` that manager's script |
| keeper | the same, and the keeper was started by `instar start` |
| bare | none of these |

What a process was handed on by an ancestor proves nothing alone: a shell below a unit hands on INVOCATION_ID.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from instar.host import processes
from instar.host.clock import Clock
from instar.host.layout import Layout
from instar.host.services import ByHand, RoleLockProbe, installed_for
from instar.host.services.systemd import in_unit

BARE = "bare"


def detect(
    layout: Layout,
    clock: Clock,
    environ: Mapping[str, str] | None = None,
    proc: Path = Path("/proc"),
    root: Path = Path("/"),
) -> str:
    """systemd, sysv, openrc, runit, supervisor, keeper or bare; as installed when no agent runs.

    `environ` is the agent's, read from `proc` when it is not given. Never raises: what cannot be read is
    no evidence.
    """
    agent = processes.recorded(layout.process("agent"))
    if agent is None or not processes.alive(agent, clock.boot_id()):
        return installed_for(layout)
    place = proc / str(agent.pid)
    environ = environment(place) if environ is None else environ
    if (root / "run/systemd/system").is_dir() and in_unit(place, "agent") is not None:
        return "systemd"
    above = parent(place)
    if name_of(above) == "runsv":
        return "runit"
    if _is_supervisord(above, environ):
        return "supervisor"
    keeper = processes.recorded(layout.process("keep"))
    if keeper is None or not processes.alive(keeper, clock.boot_id()):
        return BARE
    if above != proc / str(keeper.pid) and not RoleLockProbe(layout.role_lock("keep")).held():
        return BARE
    words = command_line(proc / str(keeper.pid))
    by = words[words.index(b"--by") + 1] if b"--by" in words[:-1] else b""
    return {b"openrc": "openrc", b"sysv": "sysv"}.get(by, ByHand.name)


def _is_supervisord(above: Path, environ: Mapping[str, str]) -> bool:
    """supervisord is a Python program: the name of its process may be the interpreter's."""
    if not environ.get("SUPERVISOR_ENABLED"):
        return False
    return any(b"supervisor" in os.path.basename(word) for word in command_line(above)[:4])


def parent(place: Path) -> Path:
    """The parent of the process at `place`; pid 0's when it cannot be told."""
    try:
        fields = (place / "stat").read_bytes().rpartition(b")")[2].split()
        return place.with_name(str(int(fields[1])))
    except (OSError, ValueError, IndexError):
        return place.with_name("0")


def name_of(place: Path) -> str:
    """The process's name as the kernel has it, at most 15 characters; '' when it is gone."""
    try:
        return (place / "comm").read_text().rstrip("\n")
    except (OSError, UnicodeDecodeError):
        return ""


def command_line(place: Path) -> list[bytes]:
    try:
        return (place / "cmdline").read_bytes().split(b"\0")[:-1]
    except OSError:
        return []


def environment(place: Path) -> dict[str, str]:
    """What the process was started with."""
    try:
        pairs = (os.fsdecode(each).partition("=") for each in (place / "environ").read_bytes().split(b"\0"))
        return {name: value for name, equals, value in pairs if equals}
    except OSError:
        return {}
