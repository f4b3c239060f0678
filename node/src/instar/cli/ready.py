"""Whether a service manager can do what `instar install` will ask of it: asked before anything is written.

    manager      for its files to be written      to start
    systemd      systemctl has an answer          systemd has started this machine
    sysv                                          the program `service`
    openrc       the program `rc-update`          the program `rc-service`; OpenRC has started this machine
    runit                                         the program `sv`; a running runsvdir
    supervisor                                    `supervisorctl` has the pid of a supervisord
    none

Looks only, and each question has a bound.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from instar.cli import units
from instar.core.errors import MachineError
from instar.host.services.base import call, search_path
from instar.host.services.runit import scanned_folder

ROOT = Path("/")
ASK_S = 10.0
OTHER = "with another --service (`none` needs no manager)"
WRITES = {"systemd": "systemctl", "openrc": "rc-update"}
STARTS = {"sysv": "service", "openrc": "rc-service", "runit": "sv", "supervisor": "supervisorctl"}


class Want(NamedTuple):
    """What there should be, and what is there instead."""

    expected: str
    got: str


def check(manager: str, start: bool, root: Path = ROOT) -> None:
    """Raises MachineError `no-manager` with the cause and the way out. `start`: it must start the node, too."""
    if want := _to_write(manager, root):
        raise _refusal(manager, want, f"install {OTHER}")
    if start and (want := _to_start(manager, root)):
        raise _refusal(manager, want, f"see to that first, or install with --no-start, or {OTHER}")


def _refusal(manager: str, want: Want, way_out: str) -> MachineError:
    text = f"cannot install for {manager}: expected {want.expected}, got {want.got}; {way_out}"
    return MachineError("no-manager", text)


def _to_write(manager: str, root: Path) -> Want | None:
    if want := _absent(WRITES.get(manager), root):
        return want
    if manager == "systemd":  # in a chroot systemctl says yes to this, and to what `install` will ask
        why = units.no_answer()
        return Want("an answer of systemd", why) if why else None
    return None


def _to_start(manager: str, root: Path) -> Want | None:
    if want := _absent(STARTS.get(manager), root):
        return want
    if manager == "systemd" and not (root / "run/systemd/system").is_dir():  # sd_booted(3)
        return Want("a machine that systemd has started", "another")
    if manager == "openrc" and not (root / "run/openrc/softlevel").exists():
        return Want("a machine that OpenRC has started", "another")
    if manager == "runit":
        return _runsvdir(root)
    return _supervisord() if manager == "supervisor" else None


def _absent(program: str | None, root: Path) -> Want | None:
    folders = (root / folder.lstrip("/") for folder in search_path().split(":") if folder)
    if program is None or any((folder / program).exists() for folder in folders):
        return None
    return Want(f"the program {program}", "none")


def _runsvdir(root: Path) -> Want | None:
    try:
        scanned_folder(root / "proc")
    except MachineError:
        return Want("a running runsvdir", "none")
    return None


def _supervisord() -> Want | None:
    """Some versions of supervisorctl end with 0 also where nobody has answered."""
    try:
        said = call(["supervisorctl", "pid"], "ask", within_s=ASK_S)
    except MachineError as error:
        said = error.text.removeprefix("cannot ask: ")
    return None if said.isdecimal() else Want("a running supervisord", said or "no answer")
