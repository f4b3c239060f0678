"""cgroup v2: a place of its own for each runner, below a group that is ours.

    <ours>/                 the service's own group (systemd, `Delegate=yes`), or instar-<pid> below the root
      agent/                the agent, its fork server and its small children
      job-7/                one run of a one-shot module
      module-inventory/     one service module

Ours is: a group that systemd delegated (its extended attribute says so, or it belongs to our user); or,
where no systemd manages the tree, a group that we make below the root. In any other group the tree is
somebody else's, and nothing is touched. A mount without controllers (the `unified` folder of a hybrid
tree) is good enough for `cgroup.kill`, the only sure way to end a process that forks faster than it can
be counted. The limits need the controllers `memory` and `pids`; a leaf says which it has.

Everything but `find` and `close` raises OSError. Standard library only, few imports.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

AGENT = "agent"
OURS = re.compile(r"instar-[0-9]+")
LEAF = re.compile(r"(?:job|module)-[a-zA-Z0-9._-]{1,80}")
CONTROLLERS = ("memory", "pids", "cpu")
DELEGATED = ("user.delegate", "trusted.delegate")  # systemd sets one of them to '1'
EMPTY_WITHIN_S = 1.0  # for killed processes to leave a group
POLL_S = 0.002


class Leaf:
    """One group that holds processes. All of it is for one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.of_one_run = folder.name.startswith("job-")  # else its name is used again
        self.limits_memory = (folder / "memory.max").exists()
        self.limits_processes = (folder / "pids.max").exists()

    def limit(self, memory: int, processes: int) -> None:
        """Bytes and processes (threads count too), where the controllers are; 0: no limit."""
        if self.limits_memory:
            self._write("memory.max", str(memory) if memory else "max")
            self._write("memory.oom.group", "1")
            with contextlib.suppress(OSError):  # a kernel without swap accounting
                self._write("memory.swap.max", "0" if memory else "max")
        if self.limits_processes:
            self._write("pids.max", str(processes) if processes else "max")

    def add(self, pid: int) -> None:
        self._write("cgroup.procs", str(pid))

    def entrance(self) -> int:
        """A descriptor to which a process writes "0" to come in. That may take the kernel 20 ms, in which
        whoever writes waits: so a process that others wait for has it done by the one that comes in."""
        return os.open(self.folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def pids(self) -> list[int]:
        """Who is in it, in this namespace's numbers."""
        return [int(line) for line in self._read("cgroup.procs").split() if line != "0"]

    def populated(self) -> bool:
        return "populated 1" in self._read("cgroup.events")

    def kill(self) -> None:
        """SIGKILL to all in it, at once, however fast they fork; before Linux 5.14 one by one."""
        if (self.folder / "cgroup.kill").exists():
            self._write("cgroup.kill", "1")
            return
        with contextlib.suppress(OSError):
            self._write("cgroup.freeze", "1")  # so that nobody forks meanwhile; SIGKILL thaws a process
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        with contextlib.suppress(OSError):
            self._write("cgroup.freeze", "0")

    def peak(self) -> int:
        """Most memory that it took, in bytes; 0 where nobody counted (no controller, before Linux 5.19)."""
        return self._number("memory.peak")

    def out_of_memory(self) -> bool:
        """Whether the kernel killed in it because of its limit."""
        return self._count("memory.events", "oom_kill") > 0

    def refused_forks(self) -> int:
        """How often a fork failed because of its limit."""
        return self._count("pids.events", "max")

    def remove(self, within_s: float = EMPTY_WITHIN_S) -> bool:
        """Kill what is in it and remove it; whether it is gone. Waits, so that what dies can leave."""
        end = time.monotonic() + within_s
        while True:
            try:
                os.rmdir(self.folder)
                return True
            except FileNotFoundError:
                return True
            except OSError:  # somebody is still in it, a zombie does not count
                with contextlib.suppress(OSError):
                    self.kill()
            if time.monotonic() >= end:
                return False
            time.sleep(POLL_S)

    def _number(self, name: str) -> int:
        try:
            return int(self._read(name))
        except (OSError, ValueError):
            return 0

    def _count(self, name: str, key: str) -> int:
        try:
            words = self._read(name).split()
            return int(words[words.index(key) + 1])
        except (OSError, ValueError, IndexError):
            return 0

    def _read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)


class Groups:
    """Our part of the tree. Made by `find`; `open` once, before the first leaf."""

    def __init__(self, folder: Path, pid: int, delegated: bool, origin: Path) -> None:
        self.folder, self._pid, self._delegated, self._origin = folder, pid, delegated, origin

    def open(self) -> None:
        """Move the agent into its leaf and turn on what controllers there are. Idempotent.

        A group with controllers turned on for its children may hold no process itself: so everybody in
        ours is moved. What an agent before us left behind is removed; the runs in it are killed.
        """
        (self.folder / AGENT).mkdir(parents=True, exist_ok=True)
        agent = Leaf(self.folder / AGENT)
        agent.add(self._pid)
        for pid in Leaf(self.folder).pids() if self._delegated else []:
            with contextlib.suppress(OSError):  # it has just ended
                agent.add(pid)
        if not self._delegated:
            _enable(self.folder.parent)
        _enable(self.folder)
        self._tidy()

    def make(self, name: str, memory: int = 0, processes: int = 0) -> Leaf:
        """An empty leaf with these limits. One of that name from before is ended first."""
        folder = self.folder / name
        try:
            folder.mkdir()
        except FileExistsError:
            if not Leaf(folder).remove():
                raise
            folder.mkdir()
        leaf = Leaf(folder)
        try:
            leaf.limit(memory, processes)
        except BaseException:
            leaf.remove()
            raise
        return leaf

    def close(self) -> None:
        """Remove what can be removed: leaves that are empty. A group of our own making is left, if it can be."""
        for folder in _leaves(self.folder):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        if not self._delegated:
            with contextlib.suppress(OSError):
                Leaf(self._origin).add(self._pid)
                os.rmdir(self.folder / AGENT)
                os.rmdir(self.folder)

    def _tidy(self) -> None:
        _end_runs(self.folder)
        if self._delegated:
            return
        for folder in self.folder.parent.iterdir():
            if OURS.fullmatch(folder.name) and folder != self.folder and not _in_use(folder):
                _end_runs(folder)
                for part in (*_leaves(folder), folder / AGENT, folder):
                    with contextlib.suppress(OSError):  # a service that is still saving its state
                        os.rmdir(part)


class Mount(NamedTuple):
    """Where a cgroup2 tree is mounted, and which group its top is."""

    root: str
    folder: Path


def find(proc: Path = Path("/proc"), systemd: Path = Path("/run/systemd/system")) -> Groups | None:
    """Our part of the tree; None where there is no cgroup v2, or none of it is ours to change."""
    try:
        pid, own = os.getpid(), _own_group((proc / "self/cgroup").read_text())
        mounts = _mounts((proc / "self/mountinfo").read_text())
        folder = next((found for mount in mounts if (found := _below(mount, own)) is not None), None)
        if folder is None:
            return None
        origin = folder
        if folder.name == AGENT and (_is_delegated(folder.parent) or OURS.fullmatch(folder.parent.name)):
            folder = folder.parent  # the program that started us was in its leaf
        if _is_delegated(folder):
            return Groups(folder, pid, True, origin) if os.access(folder, os.W_OK) else None
        if systemd.exists():
            return None
        folder = folder.parent if OURS.fullmatch(folder.name) else folder
        if not any(folder == mount.folder for mount in mounts) or not os.access(folder, os.W_OK):
            return None
        return Groups(folder / f"instar-{pid}", pid, False, origin)
    except (OSError, ValueError, StopIteration):
        return None


def _own_group(text: str) -> str:
    """The path after `0::` in /proc/self/cgroup."""
    return next(line[3:] for line in text.splitlines() if line.startswith("0::"))


def _mounts(text: str) -> list[Mount]:
    """The cgroup2 mounts of /proc/self/mountinfo: `id parent dev ROOT FOLDER options … - TYPE …`."""
    found = []
    for line in text.splitlines():
        fields, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            root, folder = fields.split()[3:5]
            found.append(Mount(root, Path(folder.encode().decode("unicode_escape"))))  # \040 is a blank
    return found


def _below(mount: Mount, own: str) -> Path | None:
    """The folder of group `own` in `mount`, if it shows that group."""
    if own == mount.root:
        return mount.folder
    top = mount.root.rstrip("/") + "/"
    if not own.startswith(top) or "/.." in own:
        return None
    folder = mount.folder / own[len(top) :]
    return folder if folder.is_dir() else None


def _is_delegated(folder: Path) -> bool:
    for name in DELEGATED:
        with contextlib.suppress(OSError):
            if os.getxattr(folder, name) == b"1":
                return True
    uid = os.geteuid()
    return uid != 0 and folder.stat().st_uid == uid


def _enable(folder: Path) -> None:
    """Each controller by itself: one that cannot be turned on must not cost us the others."""
    for name in CONTROLLERS:
        with contextlib.suppress(OSError):
            if name in (folder / "cgroup.controllers").read_text().split():
                (folder / "cgroup.subtree_control").write_text(f"+{name}")


def _leaves(folder: Path) -> list[Path]:
    try:
        return [part for part in folder.iterdir() if LEAF.fullmatch(part.name)]
    except FileNotFoundError:
        return []


def _end_runs(folder: Path) -> None:
    """Runs of an agent that is gone are killed; its services end by themselves, or by the next agent's hand."""
    for part in _leaves(folder):
        if Leaf(part).of_one_run:
            Leaf(part).remove()
        else:
            with contextlib.suppress(OSError):
                os.rmdir(part)


def _in_use(folder: Path) -> bool:
    """Whether the agent that made this group still lives in it, or is about to move into it."""
    if Path(f"/proc/{folder.name.rpartition('-')[2]}").exists():
        return True
    try:
        return Leaf(folder / AGENT).populated()
    except OSError:
        return False
