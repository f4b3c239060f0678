"""One booted container over a tree that it cannot change: run commands in it, cut its power, boot it again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from instar.core.errors import MachineError
from instar_lab import machine
from instar_lab.container.room import Room
from instar_lab.container.tree import SYSTEMD, Recipe, made_tree

BOOT_S = 60.0  # it takes 2 s, but for a machine with much else to do
DOWN_S = 60.0
COMMAND_S = 60.0
NEEDED = {"systemd-nspawn": "systemd-container", "nsenter": "util-linux", "setpriv": "util-linux"}
READY = ("running", "degraded")  # words of `systemctl is-system-running`: booted

NSPAWN = (
    "systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--console=pipe", "--link-journal=no",
    "--timezone=off", "--resolv-conf=off",
)  # fmt: skip
# The first so many files are cgroup.procs to enter, the rest is the command.
ENTER = 'n=$1; shift; while [ "$n" -gt 0 ]; do echo $$ > "$1"; shift; n=$((n - 1)); done; exec "$@"'


def why_not(cache: Path, recipe: Recipe = SYSTEMD) -> str:
    """Why no container can be had here; '' when nothing speaks against it."""
    if os.getuid() != 0:
        return "needs root"
    needed = dict(NEEDED)
    if made_tree(cache, recipe) is None:
        needed["debootstrap"] = "debootstrap"
    absent = sorted({package for program, package in needed.items() if shutil.which(program) is None})
    return f"needs the Debian packages {' and '.join(absent)}" if absent else ""


@dataclass(frozen=True, slots=True)
class Journaled:
    """A line of the journal. `wall` is unix time in seconds."""

    wall: float
    source: str  # the program's name: systemd for what the service manager says of a unit
    text: str


class Container:
    """A context manager. `folder` gets the writable layer, which lives in memory and outlives a reboot.

    When it is closed no process of the container and no mount is left; also when this process dies, the
    container does (its mounts then stay).

    systemd is PID 1, unless `first` names the command to run as process 2 in its place, below an init that
    only reaps. The folders `shown` are seen inside under the same paths; nothing inside can change them.
    """

    def __init__(
        self, tree: Path, folder: Path, first: tuple[str, ...] = (), shown: tuple[Path, ...] = ()
    ) -> None:
        self.tree, self.folder, self.first, self.shown = tree, folder, first, shown
        self.root = folder / "root"  # the container's files, as seen from outside
        self.console = folder / "console.log"
        self._layer = folder / "layer"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0
        self._room: Room | None = None

    def __enter__(self) -> Container:
        try:
            self._mount()
            self.boot()
        except BaseException:
            with contextlib.suppress(MachineError):  # why it did not boot is what is to be told
                self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- life

    def boot(self) -> None:
        """Start it and wait until systemd has started all there is to start, or `first` has been started.

        Raises MachineError.
        """
        how = ["--as-pid2", "--", *self.first] if self.first else ["--boot"]
        shown = [f"--bind-ro={path}" for path in self.shown]
        # A name of its own: systemd-nspawn has a folder in /run for each, which two of one name would share.
        name = f"--machine=lab-{hashlib.sha256(os.fsencode(self.root)).hexdigest()[:12]}"
        words = ["setpriv", "--pdeathsig", "KILL", *NSPAWN, name, f"--directory={self.root}", *shown, *how]
        self._room, self._leader = self._room or Room(), 0
        words = ["sh", "-c", ENTER, "sh", str(len(self._room.entrances)), *self._room.entrances, *words]
        with self.console.open("ab") as console:
            self._nspawn = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
        machine.wait_for(
            self._up, "a booted container", BOOT_S, lambda: machine.tail(self.console), every_s=0.05
        )

    @property
    def down(self) -> bool:
        """Whether it went down, by itself or not. To restart is no more than that: `boot` has it come up again."""
        return self._nspawn is None or self._nspawn.poll() is not None

    def _up(self) -> bool:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            said = machine.tail(self.console)
            raise MachineError("no-container", f"cannot boot: systemd-nspawn has ended: {said}")
        self._leader = self._leader or first_inside(self._nspawn.pid)
        if not self._leader:
            return False
        if self.first:
            return self.run("true").returncode == 0
        return self.run("systemctl", "is-system-running").stdout.strip() in READY

    def shut_down(self) -> None:
        """Power off in good order. Raises MachineError when it takes too long."""
        self.run("systemctl", "poweroff")
        self._ended()

    def cut_power(self) -> None:
        """End everything inside at once, with no chance to do or write anything more."""
        if self._leader:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._leader, 9)  # of a PID namespace's first process: the kernel ends all others
        elif self._nspawn is not None:
            self._nspawn.kill()  # it has not come as far as that; what it has begun dies with it
        self._ended()

    def _ended(self) -> None:
        nspawn, self._nspawn, self._leader = self._nspawn, None, 0
        if nspawn is None:
            return
        try:
            nspawn.wait(DOWN_S)
        except subprocess.TimeoutExpired:
            nspawn.kill()
            nspawn.wait(DOWN_S)
            raise MachineError("not-down", f"the container was not down within {DOWN_S:g} s") from None

    def close(self) -> None:
        try:
            self.cut_power()
        finally:
            if self._room is not None:
                self._room.remove()
            for mounted in (self.root, self._layer):
                if mounted.is_mount():
                    _call("umount", str(mounted))

    def _mount(self) -> None:
        for folder in (self.root, self._layer):
            folder.mkdir(parents=True)
        _call("mount", "-t", "tmpfs", "-o", "mode=0755,size=1g", "instar-lab", str(self._layer))
        upper, work = self._layer / "upper", self._layer / "work"
        upper.mkdir()
        work.mkdir()
        options = f"lowerdir={self.tree},upperdir={upper},workdir={work}"
        _call("mount", "-t", "overlay", "-o", options, "instar-lab", str(self.root))

    # --- inside

    def run(self, *words: str, within_s: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
        """Run a command as root inside and return how it ended, well or not. Raises MachineError when too late."""
        if not self._leader:
            raise MachineError("not-booted", f"cannot run {words[0]}: the container is not booted")
        line = ["nsenter", "-t", str(self._leader), "-a", "--", *words]
        try:
            return subprocess.run(
                line, capture_output=True, text=True, timeout=within_s, check=False, stdin=subprocess.DEVNULL,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise MachineError("too-late", f"cannot run {words[0]}: no end within {within_s:g} s") from None

    def do(self, *words: str, within_s: float = COMMAND_S) -> str:
        """Run a command that must end well; its output. Raises MachineError `command-failed`."""
        done = self.run(*words, within_s=within_s)
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip() or "it said nothing")[-2000:]
            raise MachineError(
                "command-failed", f"cannot {' '.join(words)}: status {done.returncode}: {said}"
            )
        return done.stdout

    def property(self, unit: str, name: str) -> str:
        """A property of a unit, as `systemctl show` has it."""
        return self.do("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def journal(self, unit: str) -> list[Journaled]:
        """What a unit, and systemd about it, has said; all boots, oldest first."""
        text = self.do("journalctl", f"--unit={unit}", "--output=json", "--no-pager")
        found = []
        for line in text.splitlines():
            entry = json.loads(line)
            source, said = str(entry.get("SYSLOG_IDENTIFIER", "")), entry.get("MESSAGE")
            if isinstance(said, str):
                found.append(Journaled(int(entry["__REALTIME_TIMESTAMP"]) / 1e6, source, said))
        return found

    def processes(self) -> list[machine.Seen]:
        """Every process inside, with the pid that it has outside."""
        inside = _pid_namespace(self._leader)
        return [seen for seen in machine.processes() if inside and _pid_namespace(seen.pid) == inside]


def _pid_namespace(pid: int) -> str:
    """The PID namespace of a process; '' when it is gone."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def first_inside(nspawn: int) -> int:
    """The first process of the container that systemd-nspawn has made, by its pid outside; 0 as long as there is none.

    Before it there is a child that only makes it, outside of it, and is dead soon; and it begins as a copy of
    systemd-nspawn itself.
    """
    try:
        children = Path(f"/proc/{nspawn}/task/{nspawn}/children").read_text().split()
    except OSError:
        return 0
    outside = ("", _pid_namespace(os.getpid()))
    for pid in map(int, children):
        if _pid_namespace(pid) not in outside and machine.command_line(pid)[:1] not in (
            (),
            ("systemd-nspawn",),
        ):
            return pid
    return 0


def _call(*words: str) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30.0, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError("mount-failed", f"cannot {words[0]}: {error}") from None
    if done.returncode != 0:
        raise MachineError("mount-failed", f"cannot {words[0]} {words[-1]}: {done.stderr.strip()}")
