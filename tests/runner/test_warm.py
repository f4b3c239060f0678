"""The fork server: real forks over a real line. It outlives whatever its children do, and keeps nothing of them."""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.runner.conftest import SELFTEST, ForkServer, MakeModule, Runner, ask, pipe_and_line
from tests.runner.test_python import body, gone

GOOD = "import os\ndef run(args, context): return {'pid': os.getpid(), **args}\n"


def descriptors(pid: int) -> int:
    """How many it has while it only waits: right after a run it may read a file, to hold its code."""
    counts = []
    for _ in range(10):
        counts.append(len(os.listdir(f"/proc/{pid}/fd")))
        time.sleep(0.003)
    return min(counts)


def memory(pid: int) -> int:
    """Bytes that are this process's own."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Private"))


def settled(server: ForkServer, module: dict[str, object]) -> None:
    for n in range(30):
        assert server.run(module, {"n": n}).reply["n"] == n


def test_five_hundred_runs_leave_nothing(runner: Runner, make_module: MakeModule) -> None:
    server = runner.warm()
    module = make_module("good", {"main.py": GOOD})
    settled(server, module)
    fds, used = descriptors(server.pid), memory(server.pid)
    for n in range(500):
        assert server.run(module, {"n": n}).reply["n"] == n
    assert descriptors(server.pid) == fds
    assert memory(server.pid) < used + (1 << 20)
    assert not list(children(server.pid))
    assert server.close() == 0


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_many_at_once(runner: Runner, make_module: MakeModule) -> None:
    server = runner.warm()
    module = make_module("slow", body("import time", "time.sleep(0.2)", "return args"))
    started = [server.start(ask(module, {"n": n})) for n in range(12)]
    assert [child.finish().reply for child in started] == [{"n": n} for n in range(12)]
    assert len({child.pid for child in started}) == 12


def test_it_says_how_each_one_ended(runner: Runner, make_module: MakeModule) -> None:
    server = runner.warm()
    end = server.run(make_module("memory", body("x = b'x' * (60 << 20)", "while True: raise SystemExit")))
    assert (end.code, end.exit_code) == ("module-failed", 1)
    assert end.max_rss > 60 << 20
    report = server.hear(1, "status")
    assert report["cpu_s"] > 0
    assert os.WIFEXITED(report["status"])
    assert server.run(make_module("dies", body("import os", "os.kill(os.getpid(), 11)"))).signal == 11


@pytest.mark.parametrize(
    "line",
    [
        "os.killpg(0, 9)",
        "os.kill(os.getpid(), 9)",
        "os._exit(7)",
        "os.closerange(0, 1000)",
        "os.fork(); os.fork(); time.sleep(0.1); return {}",
        "os.fork() or time.sleep(600); return {}",
        "[os.close(n) for n in range(3, 300) if not os.close(n)]",
        "signal.setitimer(signal.ITIMER_REAL, 0.01); time.sleep(9)",
        "raise BaseException",
        "sys.setrecursionlimit(1 << 30); f = lambda: f(); f()",
        "import gc, socket; [o.close() for o in gc.get_objects() if isinstance(o, socket.socket)]; return {}",
        "sys.modules.clear(); return {}",
        "import instar.runner.warm as w; w.work = None; return {}",
    ],
)
def test_it_outlives_its_children(runner: Runner, make_module: MakeModule, line: str) -> None:
    server = runner.warm()
    good = make_module("good", {"main.py": GOOD})
    bad = make_module("bad", body("import os, signal, sys, time", line))
    for _ in range(2):
        server.start(ask(bad, seconds=2.0, memory=64 << 20)).finish()
        assert server.run(good, {"n": 1}).reply["n"] == 1
    assert descriptors(server.pid) == 8  # 0 to 3, and two pipes
    assert server.close() == 0


def test_one_run_leaves_nothing_for_the_next(runner: Runner, make_module: MakeModule) -> None:
    server = runner.warm()
    spoil = "import builtins, json, os, sys, time\n"
    lines = [
        "sys.modules['left'] = sys",
        "builtins.left = 1",
        "os.environ['LEFT'] = '1'",
        "json.dumps = None",
    ]
    lines += ["os.umask(0)", "sys.path.insert(0, '/left')", "os.chdir('/')", "return None"]
    look = body(
        "import builtins, json, os, sys",
        "return {'left': [hasattr(builtins, 'left'), 'left' in sys.modules, 'LEFT' in os.environ, '/left' in sys.path],"
        " 'dumps': json.dumps(1), 'umask': os.umask(0), 'cwd': os.getcwd()}",
    )
    server.run(make_module("spoil", body(*lines, before=spoil)))
    reply = server.run(make_module("look", look)).reply
    assert reply == {"left": [False] * 4, "dumps": "1", "umask": 0o77, "cwd": str(runner.cwd)}


def test_a_file_that_has_changed_is_compiled_again(runner: Runner, make_module: MakeModule) -> None:
    """The fork server holds code by the bytes that it was made of, so it cannot run what is no longer there."""
    server = runner.warm()
    for n in range(5):
        module = make_module("changes", {"main.py": f"def run(args, context): return {{'n': {n}}}\n"})
        for _ in range(3):
            assert server.run(module).reply == {"n": n}


def test_held_code_has_its_own_file_in_tracebacks(runner: Runner, make_module: MakeModule) -> None:
    server = runner.warm()
    source = body("if args: raise ValueError", "return {}")
    for name in ("one", "two"):
        module = make_module(name, source)
        for _ in range(3):
            server.run(module)
        assert f"{module['folder']}/main.py" in server.run(module, {"x": 1}).stderr


def test_code_that_was_never_run_well_is_not_held(runner: Runner, make_module: MakeModule) -> None:
    server = runner.warm()
    for _ in range(3):
        assert server.run(make_module("bad", {"main.py": "def run(:\n"})).code == "not-loadable"
    assert server.run(SELFTEST, {"nonce": "ab" * 16}).reply


def test_bad_messages_are_answered(runner: Runner) -> None:
    server = runner.warm()
    for raw in (b"{", b"[]", b'{"n":"x"}', b'{"n":7}', b"[" * 4000):
        server.line.sendall(raw)
        message = json.loads(server.line.recv(4096))
        assert message["error"].startswith("cannot fork a runner")
        assert message["n"] == (7 if b"7" in raw else -1)
    read_end, write_end, ours, theirs = pipe_and_line()
    rights = array.array("i", [write_end])  # one descriptor is one too few
    server.line.sendmsg([b'{"n":8}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    assert "error" in json.loads(server.line.recv(4096))
    os.close(write_end)
    assert os.read(read_end, 1) == b""  # it kept none of them
    os.close(read_end)
    ours.close()
    theirs.close()
    assert server.run(SELFTEST, {"nonce": "ab" * 16}).reply


def test_a_runner_that_is_told_nothing_ends_with_its_line(runner: Runner) -> None:
    server = runner.warm()
    child = server.start(None)
    child.line.shutdown(1)
    assert child.finish().exit_code == 5


def test_what_it_forked_ends_with_it(runner: Runner, make_module: MakeModule) -> None:
    server = runner.warm()
    module = make_module("long", body("import time", "context.log('in')", "time.sleep(600)"))
    child = server.start(ask(module))
    child.until("log")
    os.kill(server.pid, signal.SIGKILL)
    assert gone(child.pid)
    server.process.wait()


def test_left_over_children_end_with_their_runner(runner: Runner, make_module: MakeModule) -> None:
    server = runner.warm()
    lines = ["import subprocess", "return {'pid': subprocess.Popen(['sleep', '600']).pid}"]
    end = server.run(make_module("leaves", body(*lines)))
    assert gone(end.reply["pid"])


def test_signals_that_the_starter_ignores_are_not_ignored(runner: Runner, make_module: MakeModule) -> None:
    old = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        server = runner.warm()
    finally:
        signal.signal(signal.SIGTERM, old)
    child = server.start(
        ask(make_module("long", body("import time", "context.log('in')", "time.sleep(600)")))
    )
    child.until("log")
    os.kill(child.pid, signal.SIGTERM)
    assert child.finish().signal == signal.SIGTERM
