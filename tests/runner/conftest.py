"""Plays the agent's side of the control line: starts real runner processes, cold or warm, and talks with them.

end = runner.run(module, {"n": 1})            # one-shot, cold: start, ask, wait for the end
child = runner.start(request)                 # anything else: child.say, child.hear, child.until, child.finish
module = make_module("demo", {"main.py": "…"})   # a folder as the shelf would hand it over, and its request
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from instar.host.program import Program
from instar.trust.program import program_digest
from instar_lab.program import build

VERSION = "1.2.3"
WITHIN_S = 60.0  # where much else runs, a process may take ten seconds for its start
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "INSTAR_TEST_SECRET": "x"}
LIMITS = {
    "seconds": 60.0,
    "memory": 256 << 20,
    "processes": 32,
    "files": 256,
    "cpu_s": 0,
    "disk": 64 << 20,
    "output": 1 << 20,
}


@dataclass
class End:
    """How a runner ended. `answer` is its last line, {} when that was no answer."""

    lines: list[dict[str, Any]]
    exit_code: int
    signal: int
    stderr: str
    max_rss: int = 0
    raw: bytes = b""

    @property
    def answer(self) -> dict[str, Any]:
        return self.lines[-1] if self.lines and "ok" in self.lines[-1] else {}

    @property
    def reply(self) -> Any:
        assert self.answer.get("ok") is True, (self.lines, self.exit_code, self.signal, self.stderr)
        return self.answer["reply"]

    @property
    def code(self) -> str:
        """The error's code; '' for a reply or for none at all."""
        return str(self.answer.get("error", {}).get("code", ""))

    def said(self, key: str) -> list[Any]:
        """The values of `key` in all the lines that have it."""
        return [line[key] for line in self.lines if key in line]


@dataclass
class Child:
    """One runner process: the test's end of its control line and of its errors."""

    line: socket.socket
    errors: int
    pid: int
    reap: Callable[[float], tuple[int, int]]  # -> (wait status, max_rss)
    lines: list[dict[str, Any]] = field(default_factory=list)
    stderr: bytes = b""
    raw: bytes = b""
    _rest: bytes = b""
    _open: bool = True

    def say(self, message: dict[str, Any]) -> None:
        self.line.sendall(json.dumps(message).encode() + b"\n")

    def hear(self, within_s: float = WITHIN_S) -> dict[str, Any] | None:
        """The next line; None at the end of the control line. Raises TimeoutError."""
        end = time.monotonic() + within_s
        while b"\n" not in self._rest:
            if not self._open:
                return None
            self._pull(end)
        raw, _, self._rest = self._rest.partition(b"\n")
        message = json.loads(raw)
        assert isinstance(message, dict)
        self.lines.append(message)
        return message

    def until(self, key: str, value: Any = None, within_s: float = WITHIN_S) -> dict[str, Any]:
        """Read lines up to the first one with `key` (and `value`)."""
        end = time.monotonic() + within_s
        while True:
            message = self.hear(max(0.0, end - time.monotonic()))
            assert message is not None, (self.lines, self.drain())
            if key in message and (value is None or message[key] == value):
                return message

    def finish(self, within_s: float = WITHIN_S) -> End:
        """Read up to the end; raises TimeoutError when it does not end in time (it is killed then)."""
        try:
            end = time.monotonic() + within_s
            while self.hear(max(0.0, end - time.monotonic())) is not None:
                pass
            status, max_rss = self.reap(max(0.1, end - time.monotonic()))
        except TimeoutError:
            self.kill()
            self.reap(WITHIN_S)
            raise
        finally:
            self.drain()
            self.close()
        code = os.waitstatus_to_exitcode(status)
        text = self.stderr.decode(errors="replace")
        return End(self.lines, max(code, 0), max(-code, 0), text, max_rss, self.raw)

    def drain(self) -> str:
        """What standard error has now."""
        while self.errors >= 0 and select.select([self.errors], [], [], 0)[0]:
            chunk = os.read(self.errors, 65_536)
            if not chunk:
                break
            self.stderr = (self.stderr + chunk)[-65_536:]
        return self.stderr.decode(errors="replace")

    def kill(self) -> None:
        for send in (os.killpg, os.kill):
            try:
                send(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def close(self) -> None:
        self.line.close()
        if self.errors >= 0:
            os.close(self.errors)
            self.errors = -1

    def _pull(self, end: float) -> None:
        sources: list[Any] = [self.line] + ([self.errors] if self.errors >= 0 else [])
        ready, _, _ = select.select(sources, [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError(f"nothing from the runner; so far {self.lines}, {self.drain()}")
        if self.errors in ready:
            chunk = os.read(self.errors, 65_536)
            if not chunk:
                os.close(self.errors)
                self.errors = -1
            self.stderr = (self.stderr + chunk)[-65_536:]
        if self.line in ready:
            try:
                chunk = self.line.recv(65_536)
            except ConnectionResetError:
                chunk = b""
            self._open = bool(chunk)
            self.raw = (self.raw + chunk)[-1_000_000:]
            self._rest += chunk


def pipe_and_line() -> tuple[int, int, socket.socket, socket.socket]:
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    ours, theirs = socket.socketpair()
    return read_end, write_end, ours, theirs


class Runner:
    """Starts runners of one program. Whatever a test left running is killed at its end."""

    def __init__(self, program: Program, cwd: Path) -> None:
        self.program = program
        self.cwd = cwd
        self.started: list[Child] = []
        self.servers: list[ForkServer] = []

    def start(
        self,
        request: dict[str, Any] | bytes | None,
        cwd: Path | None = None,
        user: int | None = None,
        command: list[str] | None = None,
    ) -> Child:
        """A cold runner; `request` is its first line (None: not said yet). `user`: the number to start it as."""
        read_end, write_end, ours, theirs = pipe_and_line()
        process = spawn(command or self.program.command("runner"), theirs, write_end, cwd or self.cwd, user)
        os.close(write_end)
        theirs.close()

        def reap(within_s: float) -> tuple[int, int]:
            end = time.monotonic() + within_s
            while time.monotonic() < end:
                if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    try:
                        os.killpg(process.pid, signal.SIGKILL)  # what it left behind
                    except ProcessLookupError:
                        pass
                    _, status, usage = os.wait4(process.pid, 0)
                    process.returncode = status
                    return status, usage.ru_maxrss * 1024
                time.sleep(0.002)
            raise TimeoutError("the runner did not end")

        child = Child(ours, read_end, process.pid, reap)
        self.started.append(child)
        self._ask(child, request)
        return child

    def run(self, module: dict[str, Any], args: dict[str, Any] | None = None, **more: Any) -> End:
        """One run of a one-shot module, cold, up to its end."""
        return self.start(ask(module, args, **more)).finish()

    def serve(self, module: dict[str, Any], data: Path, **more: Any) -> Child:
        """A service module, started; the caller waits for {"state": "ready"}."""
        data.mkdir(mode=0o700, exist_ok=True)
        return self.start(ask(module, do="serve", data=str(data), **more), cwd=data)

    def warm(self) -> ForkServer:
        server = ForkServer(self)
        self.servers.append(server)
        return server

    @staticmethod
    def _ask(child: Child, request: dict[str, Any] | bytes | None) -> None:
        if isinstance(request, bytes):
            child.line.sendall(request)
        elif request is not None:
            child.say(request)

    def close(self) -> None:
        for child in self.started:
            if child.line.fileno() >= 0:
                child.kill()
                try:
                    child.reap(WITHIN_S)
                except (TimeoutError, OSError, AssertionError):  # its fork server may be gone
                    pass
                child.close()
        for server in self.servers:
            server.close()


class ForkServer:
    """`runner --warm` and the agent's end of its line."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.count = 0
        self.said: dict[int, list[dict[str, Any]]] = {}
        self.errors, write_end = os.pipe2(os.O_CLOEXEC)
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = spawn(runner.program.command("runner", "--warm"), theirs, write_end, runner.cwd, None)
        os.close(write_end)
        theirs.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self, request: dict[str, Any] | bytes | None, cwd: Path | None = None) -> Child:
        self.count += 1
        n = self.count
        read_end, write_end, ours, theirs = pipe_and_line()
        fds = array.array("i", [theirs.fileno(), write_end])
        if isinstance(request, dict):
            request = {"cwd": str(cwd or self.runner.cwd), **request}
        body = json.dumps({"n": n}).encode()
        self.line.sendmsg([body], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        os.close(write_end)
        theirs.close()
        pid = self.hear(n, "pid")["pid"]

        def reap(within_s: float) -> tuple[int, int]:
            message = self.hear(n, "status", within_s)
            return message["status"], message["max_rss"]

        child = Child(ours, read_end, pid, reap)
        self.runner.started.append(child)
        self.runner._ask(child, request)
        return child

    def run(self, module: dict[str, Any], args: dict[str, Any] | None = None, **more: Any) -> End:
        return self.start(ask(module, args, **more)).finish()

    def hear(self, n: int, key: str, within_s: float = WITHIN_S) -> dict[str, Any]:
        """The message about fork number `n` that has `key`."""
        end = time.monotonic() + within_s
        while True:
            for message in self.said.get(n, []):
                if key in message:
                    return message
            self.line.settimeout(max(0.001, end - time.monotonic()))
            raw = self.line.recv(65_536)
            assert raw, f"the fork server has ended: {self.last_words()}"
            message = json.loads(raw)
            self.said.setdefault(message["n"], []).append(message)

    def last_words(self) -> str:
        return os.read(self.errors, 65_536).decode() if select.select([self.errors], [], [], 0)[0] else ""

    def close(self) -> int:
        """Close its line; it must end by that alone."""
        if self.process.returncode is None:
            self.line.close()
            try:
                self.process.wait(WITHIN_S)
            finally:
                self.process.kill()
                self.process.wait()
            os.close(self.errors)
        return int(self.process.returncode)


def spawn(
    command: list[str], line: socket.socket, errors: int, cwd: Path, user: int | None
) -> subprocess.Popen[bytes]:
    """Start a process as the agent does: 0 is empty, 1 and 2 the pipe, 3 the line, nothing else."""
    fd = line.fileno()
    assert fd > 3

    def place() -> None:
        os.dup2(fd, 3)
        if user is not None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=errors,
        stderr=errors,
        cwd=cwd,
        env=ENVIRONMENT,
        pass_fds=(3,),
        preexec_fn=place,
        start_new_session=True,
    )


def ask(
    module: dict[str, Any],
    args: dict[str, Any] | None = None,
    do: str = "run",
    data: str = "",
    user: str = "",
    touches: dict[str, Any] | None = None,
    **limits: Any,
) -> dict[str, Any]:
    """The first line for a runner. Limits by name: ask(module, seconds=1.0, memory=64 << 20)."""
    return {
        "v": 1,
        "do": do,
        "module": module,
        "args": args or {},
        "data": data,
        "limits": LIMITS | limits,
        "touches": touches or {},
        "user": user,
    }


SELFTEST = {"name": "selftest", "builtin": True}
MakeModule = Callable[..., dict[str, Any]]


@pytest.fixture
def make_module(tmp_path: Path) -> MakeModule:
    """make_module(name, {"main.py": source}, runs="python", mode="oneshot", entry="main.py") -> 'module' of a request."""

    def make(
        name: str,
        files: dict[str, str | bytes],
        runs: str = "python",
        mode: str = "oneshot",
        entry: str = "",
        stateful: bool = False,
        version: str = "1.0.0",
    ) -> dict[str, Any]:
        folder = tmp_path / "modules" / name / "releases" / f"{version}-0123456789ab"
        for path, content in files.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        return {
            "name": name,
            "version": version,
            "digest": "0123456789ab" * 8,
            "folder": str(folder),
            "runs": runs,
            "mode": mode,
            "entry": entry or next(iter(files)),
            "stateful": stateful,
        }

    return make


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The node program, built from this source."""
    path = tmp_path_factory.mktemp("program") / "instar.pyz"
    built = build.build(VERSION)
    build.write(built, path)
    assert program_digest(path.read_bytes()) == built.digest
    return Program(VERSION, built.digest, path, "")


@pytest.fixture
def runner(program: Program, tmp_path: Path) -> Iterator[Runner]:
    cwd = tmp_path / "scratch"
    cwd.mkdir(mode=0o700)
    made = Runner(program, cwd)
    yield made
    made.close()
