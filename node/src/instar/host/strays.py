"""Stray processes of a role: started by hand, or left behind, and not the one that is recorded (D5).

A stray is known by what it executes: an interpreter, whose program is an Instar program, whose first words are
`<role>` or `launch <role>`, and whose `--state` is the very folder of this node. The folder is compared as the
process itself sees it, by device and inode: a node in a container has the same path and another folder.
Never a stray: the recorded process and what it has forked, this process and its ancestors, a rehearsal,
another state folder's process, an editor or a pager that has the program open. What cannot be told is left
alone.

Told apart by pid and start time, signalled through pidfds.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from instar.core.errors import MachineError
from instar.host import processes
from instar.host.layout import Layout
from instar.host.processes import Process

KILL_S = 5.0
PROC = Path("/proc")
INTERPRETER = re.compile(r"(?:python|pypy)[0-9.]*(?:-dbg|d|m)?(?: \(deleted\))?")
WITH_VALUE = ("-X", "-W", "--check-hash-based-pycs")  # options of the interpreter that take the next word
MODULE = "instar"  # `python3 -m instar …`
PROGRAM = ".pyz"

log = logging.getLogger("instar.host")


def find(layout: Layout, role: str, boot_id: str) -> list[Process]:
    """The strays of `role`, oldest first. Reads what runs once; never fails."""
    recorded = processes.recorded(layout.process(role))
    spared = _ancestors(os.getpid())
    if recorded is not None and processes.alive(recorded, boot_id):
        spared.add(recorded.pid)
    found = []
    for pid in _pids():
        if pid in spared or role not in _words(PROC / str(pid)):
            continue
        started = processes.start_time(pid)
        if started is None or not _plays(pid, layout, role):
            continue
        process = Process(pid, started, boot_id)
        # Looked at once more: what was read may have been of the process that had this number before.
        if processes.alive(process, boot_id) and not _ancestors(pid) & _living(recorded, boot_id):
            found.append(process)
    return sorted(found, key=lambda process: (process.started, process.pid))


def end(strays: list[Process], boot_id: str, grace_s: float, kill_s: float = KILL_S) -> dict[int, str]:
    """End them all at once: TERM, wait `grace_s`, KILL, wait `kill_s`. How each ended, by pid: 'gone',
    'stopped' or 'killed'. Raises MachineError `not-gone` when one is still there.
    """
    fds = {stray.pid: fd for stray in strays if (fd := processes.open_pidfd(stray, boot_id)) is not None}
    how = dict.fromkeys((stray.pid for stray in strays), "gone")
    try:
        left = dict(fds)
        for word, number, wait_s in (
            ("stopped", signal.SIGTERM, grace_s),
            ("killed", signal.SIGKILL, kill_s),
        ):
            for fd in left.values():
                _send(fd, number)
            gone = _wait(left, wait_s)
            how.update(dict.fromkeys(gone, word))
            left = {pid: fd for pid, fd in left.items() if pid not in gone}
        if left:
            pids = ", ".join(map(str, sorted(left)))
            raise MachineError("not-gone", f"cannot end process {pids}: still there after SIGKILL")
    finally:
        for fd in fds.values():
            os.close(fd)
    for stray in strays:
        log.warning("process %d, which no record names, was ended: %s", stray.pid, how[stray.pid])
    return how


def _send(pidfd: int, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return
    except PermissionError:
        return  # it is then still there at the end, and told


def _wait(fds: dict[int, int], within_s: float) -> set[int]:
    """Those that end within the time, which is for all of them."""
    until = time.monotonic() + within_s
    return {pid for pid, fd in fds.items() if processes.wait_gone(fd, max(0.0, until - time.monotonic()))}


# --- what a process executes


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir(PROC) if name.isdigit())


def _plays(pid: int, layout: Layout, role: str) -> bool:
    place = PROC / str(pid)
    said = _of_program(_words(place))
    if not said or _role(said) != role or any(_is_option(word, "--rehearse") for word in said):
        return False
    state = _value(said, "--state")
    if not state:
        return False
    try:
        if not INTERPRETER.fullmatch(os.path.basename(os.readlink(place / "exe"))):
            return False
        return _is_folder(place, state, layout.state)
    except PermissionError:  # it may do more than we may: its lock tells whose it is
        return pid in _holders(layout.role_lock(role))
    except OSError:
        return False


def _words(place: Path) -> list[str]:
    try:
        return [os.fsdecode(word) for word in (place / "cmdline").read_bytes().split(b"\0")[:-1]]
    except OSError:
        return []


def _of_program(words: list[str]) -> list[str]:
    """What the program that an interpreter runs was given; [] when that is no program of ours."""
    at = 1
    while at < len(words) and words[at].startswith("-") and words[at] != "-":
        word = words[at]
        if word.startswith("--"):
            at += 2 if word in WITH_VALUE else 1
            continue
        letters = word[1:]
        if (found := re.search(r"[cmXW]", letters)) is None:
            at += 1
            continue
        rest, letter = letters[found.end() :], found[0]
        if letter == "c":
            return []
        if letter == "m":
            name, after = (rest, at + 1) if rest else (words[at + 1] if at + 1 < len(words) else "", at + 2)
            return words[after:] if name == MODULE else []
        at += 1 if rest else 2
    return words[at + 1 :] if at < len(words) and words[at].endswith(PROGRAM) else []


def _role(said: list[str]) -> str:
    """The role that `agent …`, `updater …` or `launch ROLE …` is about."""
    if said[0] == "launch":
        return said[1] if len(said) > 1 else ""
    return said[0]


def _is_option(word: str, name: str) -> bool:
    """Whether `word` is the option `name`, which may be shortened, with or without its value."""
    short = word.partition("=")[0]
    return len(short) > 3 and name.startswith(short)


def _value(said: list[str], name: str) -> str:
    for n, word in enumerate(said):
        if _is_option(word, name):
            return word.partition("=")[2] if "=" in word else said[n + 1] if n + 1 < len(said) else ""
    return ""


def _is_folder(place: Path, path: str, folder: Path) -> bool:
    """Whether what the process calls `path` is `folder`. Where it has gone to another working folder since
    it was started, its environment may say where that was. Raises OSError."""
    ours = os.stat(folder)
    if path.startswith("/"):
        return os.path.samestat(os.stat(f"{place}/root{path}"), ours)
    began = next(
        (w[4:] for w in (place / "environ").read_bytes().split(b"\0") if w.startswith(b"PWD=/")), b""
    )
    for start in (f"{place}/cwd", *([f"{place}/root{os.fsdecode(began)}"] if began else [])):
        try:
            if os.path.samestat(os.stat(f"{start}/{path}"), ours):
                return True
        except FileNotFoundError:
            continue
    return False


def _holders(lock: Path) -> set[int]:
    """The processes that hold the flock on `lock`."""
    try:
        status = os.stat(lock)
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        lines = [line.split() for line in (PROC / "locks").read_text().splitlines()]
    except OSError:
        return set()
    held = [words for words in lines if len(words) >= 6 and words[1] == "FLOCK" and words[5] == device]
    return {int(words[4]) for words in held if words[4].isdigit()}


# --- kinship


def _ancestors(pid: int) -> set[int]:
    """`pid`, its parent, and so on."""
    line: set[int] = set()
    while pid > 0 and pid not in line:
        line.add(pid)
        pid = _parent(pid)
    return line


def _parent(pid: int) -> int:
    try:
        return int((PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _living(process: Process | None, boot_id: str) -> set[int]:
    return {process.pid} if process is not None and processes.alive(process, boot_id) else set()
