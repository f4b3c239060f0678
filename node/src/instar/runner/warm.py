"""The fork server: an interpreter that has what modules need, and forks a runner when the agent says so.

    agent   {"n": int} with descriptors: the control line's end, where errors go, and perhaps a cgroup.procs
    here    {"n", "pid"}, and once it has ended {"n", "pid", "status", "max_rss", "cpu_s"}
            {"n", "error"} when no process could be made

It runs nothing of any module. What it may keep of one is the code that it compiled itself from a file that
was run to a good end before: compiling a file that breaks the compiler then breaks one run, not this.
It ends when its line does; what it forked ends with it, by the kernel's parent-death signal.
"""

from __future__ import annotations

import array
import contextlib
import gc
import hashlib
import json
import os
import select
import signal
import socket
import sys
from types import ModuleType
from typing import Any, NoReturn

from instar.runner import bounds, python
from instar.runner.border import leave, show, tell
from instar.runner.kinds import ModuleSpec
from instar.runner.line import CONTROL, GONE, encode
from instar.runner.reply import encode_reply
from instar.runner.request import parse
from instar.runner.work import work

MOST_MESSAGE = 4_096
ANNOUNCE = 4  # descriptor, in a fresh runner only
MOST_DESCRIPTORS = 64  # this process never has that many
FOR_MODULES = (
    "collections", "ctypes", "dataclasses", "functools", "hashlib", "io", "ipaddress", "itertools", "pathlib",
    "platform", "pwd", "re", "select", "shutil", "socket", "stat", "struct", "subprocess", "traceback",
    "instar.host.files", "instar.modules.selftest", "instar.runner.builtin", "instar.runner.landlock",
    "instar.runner.native", "instar.trust.program",
)  # fmt: skip


def serve(program: str) -> int:
    """Until the line ends. Returns the exit status."""
    bounds.settle()
    bounds.plain_environment()
    _preload()
    server = _ForkServer(program)
    gc.collect()
    gc.freeze()  # what is here already is not searched, and so not copied, by any child
    server.run()
    return 0


def _warm_up(program: str) -> None:
    """In a runner that waits for its first line: walk the ways that its run will take. The pages that they touch
    are its own by then; the agent keeps one runner ahead, for which this costs no time."""
    limits = {"seconds": 1.0, "memory": 1}
    module = {"name": "x", "version": "0", "digest": "", "folder": "/", "runs": "python", "mode": "oneshot"}
    message = {"v": 1, "do": "run", "module": {**module, "entry": "x"}, "args": {}, "limits": limits}
    request = parse(json.loads(encode(message)), "0")
    encode_reply({"name": request.module.name, "parts": [1, 2.0, None, True, {"text": "x"}]})
    code = compile("def run(args, context):\n    return {}\n", "x", "exec")
    exec(code, ModuleType("x").__dict__)  # noqa: S102  our own line
    hashlib.sha256(b"x" * 1024).hexdigest()
    os.path.abspath(program)
    bounds.warm_up()
    native = sys.modules.get("instar.runner.native")  # not where this Python has no ctypes
    if native is not None:
        native.warm_up()


def _preload() -> None:
    import importlib

    for name in FOR_MODULES:
        try:
            importlib.import_module(name)
        except ImportError as error:  # a Python that lacks it: modules go without, too
            tell(f"instar: the fork server does without {name}: {error}")


class _ForkServer:
    def __init__(self, program: str) -> None:
        self._program, self._pid = program, os.getpid()
        self._line = socket.socket(fileno=CONTROL)
        self._line.setblocking(True)
        os.set_inheritable(CONTROL, False)
        os.closerange(CONTROL + 1, MOST_DESCRIPTORS)
        self._ended_read, self._ended_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._told_read, self._told_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll = select.poll()
        for fd in (CONTROL, self._ended_read):
            self._poll.register(fd, select.POLLIN)
        self._numbers: dict[int, int] = {}  # pid -> the agent's number
        self._paths: dict[int, str] = {}  # pid -> the file that it runs

    def run(self) -> None:
        signal.set_wakeup_fd(self._ended_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                ready = {fd for fd, _ in self._poll.poll()}
                if CONTROL in ready and not self._hear():
                    return
                if self._ended_read in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._ended_read, MOST_MESSAGE)
                    self._reap()

    # --- starting

    def _hear(self) -> bool:
        """Take one message. False at the end of the line."""
        raw, fds = _receive(self._line)
        try:
            if raw:
                self._start(raw, fds)
        finally:
            for fd in fds:
                os.close(fd)
        return bool(raw)

    def _start(self, raw: bytes, fds: list[int]) -> None:
        number = -1
        try:
            number = int(json.loads(raw)["n"])
            control, errors, *entrance = fds
            pid = os.fork()
        except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
            self._say({"n": number, "error": f"cannot fork a runner: {error}"})
            return
        if pid == 0:
            self._become_runner(control, errors, entrance)
        self._numbers[pid] = number
        self._say({"n": number, "pid": pid})

    def _become_runner(self, control: int, errors: int, entrance: list[int]) -> NoReturn:
        """In the child: from here on as if started cold."""
        status = GONE
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            bounds.end_with_parent(signal.SIGKILL)
            if os.getppid() != self._pid:  # it ended before the kernel was asked
                leave(GONE)
            for cgroup in entrance:
                os.write(cgroup, b"0")  # this process; it may take 20 ms, and nobody else waits meanwhile
            self._line.detach()
            announce = os.dup(self._told_write)  # it may have the place that another is to have
            for fd, place in ((control, CONTROL), (errors, 1), (errors, 2), (announce, ANNOUNCE)):
                os.dup2(fd, place, inheritable=place < CONTROL)
            os.closerange(ANNOUNCE + 1, MOST_DESCRIPTORS)
            _warm_up(self._program)
            status = work(self._program, _announce)
        except BaseException as error:
            show(error)
            raise
        finally:
            leave(status)  # nothing of this goes back into the fork server's own code

    # --- ending

    def _reap(self) -> None:
        """Report every child that has ended. What is left of its group is ended first: its number is still its."""
        while found := self._ended():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(found, signal.SIGKILL)
            _, status, usage = os.wait4(found, 0)
            number = self._numbers.pop(found, None)
            if number is not None:
                cpu_s, max_rss = round(usage.ru_utime + usage.ru_stime, 6), usage.ru_maxrss * 1024
                self._say({"n": number, "pid": found, "status": status, "max_rss": max_rss, "cpu_s": cpu_s})
            self._learn(found, status)

    @staticmethod
    def _ended() -> int:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return 0
        return found.si_pid if found else 0

    def _learn(self, pid: int, status: int) -> None:
        """Hold the code of what ran well."""
        with contextlib.suppress(BlockingIOError):
            for entry in os.read(self._told_read, 65_536).split(b"\0"):
                number, _, path = entry.partition(b" ")
                if path:
                    self._paths[int(number)] = os.fsdecode(path)
        path_of = self._paths.pop(pid, "")
        if path_of and status == 0:
            with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError, MemoryError):
                python.hold(path_of, path_of)

    def _say(self, message: dict[str, Any]) -> None:
        self._line.sendall(json.dumps(message).encode())


def _receive(line: socket.socket) -> tuple[bytes, list[int]]:
    """One message and the descriptors with it; b"" at the end."""
    room = socket.CMSG_SPACE(3 * array.array("i").itemsize)
    raw, extra, _, _ = line.recvmsg(MOST_MESSAGE, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in extra:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return raw, list(fds)


def _announce(module: ModuleSpec) -> None:
    """In a runner, before anything of the module: say which file it is. The module never sees this descriptor."""
    path = os.fsencode(f"{module.home}/{module.entry}")
    if module.runs == "python" and len(path) < select.PIPE_BUF - 16:
        with contextlib.suppress(OSError):
            os.write(ANNOUNCE, b"%d %s\0" % (os.getpid(), path))
    os.close(ANNOUNCE)
