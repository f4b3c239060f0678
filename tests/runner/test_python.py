"""Python modules in real runner processes: what good ones can do, and what becomes of bad ones."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from instar.host.program import Program
from instar.runner.line import MOST_LINE
from instar.runner.reply import MOST_REPLY
from instar.wire.codec import MAX_DEPTH, decode, encode
from instar.wire.messages import MAX_FRAME, Result
from tests.runner.conftest import SELFTEST, VERSION, MakeModule, Runner, ask

NONCE = "ab" * 16
GOOD = "def run(args, context):\n    return {'sum': args['a'] + args['b'], 'name': context.name, 'version': context.version}\n"


def body(*lines: str, before: str = "") -> dict[str, str]:
    """The files of a one-shot module whose `run` has these lines."""
    inner = "\n".join(f"    {line}" for line in lines)
    return {"main.py": f"{before}\ndef run(args, context):\n{inner}\n"}


def test_the_bounds_are_those_of_the_channel() -> None:
    assert MOST_LINE == MAX_FRAME
    deep: Any = 1
    for _ in range(29):
        deep = [deep]
    reply = {"deep": deep, "text": "x" * (MOST_REPLY - 200), "number": 2**63 - 1}
    frame = encode(Result("j" * 60, ok=True, reply=reply, stderr="\x01" * 4096))
    assert decode(frame)
    assert MAX_DEPTH == 32


# --- good ones


def test_selftest_proves_the_program(runner: Runner, program: Program) -> None:
    expected = hashlib.sha256(f"{NONCE}:{program.digest}:{VERSION}".encode()).hexdigest()
    reply = {"nonce": NONCE, "answer": expected, "version": VERSION, "digest": program.digest}
    for start in (runner.run, runner.warm().run):
        end = start(SELFTEST, {"nonce": NONCE})
        assert end.reply == reply
        assert (end.exit_code, end.signal, end.stderr) == (0, 0, "")


def test_a_module_answers(runner: Runner, make_module: MakeModule) -> None:
    end = runner.run(make_module("calc", {"main.py": GOOD}), {"a": 2, "b": 3})
    assert end.reply == {"sum": 5, "name": "calc", "version": "1.0.0"}
    assert (end.exit_code, end.signal, end.stderr) == (0, 0, "")


def test_lines_while_it_runs(runner: Runner, make_module: MakeModule) -> None:
    files = body(
        "context.log('one')",
        "context.progress(0.5, 'half')",
        "context.progress(7)",
        "context.progress(float('nan'))",
        "context.log('n\\nl \\udc80 ' + 'x' * 20000)",
        "return {'ok': True}",
    )
    end = runner.run(make_module("talk", files))
    assert [*end.lines[0].items(), *end.lines[1].items()] == [
        ("log", "one"),
        ("progress", 0.5),
        ("text", "half"),
    ]
    assert end.said("progress") == [0.5, 1.0, -1.0]
    assert end.said("log")[1].startswith("n\nl ? xxx")
    assert len(end.said("log")[1]) == 8192
    assert end.reply == {"ok": True}


def test_a_reply_in_pieces(runner: Runner, make_module: MakeModule) -> None:
    files = body("context.text('a')", "context.text('b')", "context.put('n', [1, 2])")
    assert runner.run(make_module("pieces", files)).reply == {"text": "ab", "n": [1, 2]}
    more = body("context.put('n', 1)", "context.put('m', 1)", "return {'n': 2}")
    assert runner.run(make_module("more", more)).reply == {"n": 2, "m": 1}
    assert runner.run(make_module("empty", body("pass"))).reply == {}


def test_a_module_of_several_files_finds_its_own(runner: Runner, make_module: MakeModule) -> None:
    files = {
        "main.py": "import helper, parts.inner as inner\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int\n"
        "def run(args, context):\n    return {'h': helper.H, 'i': inner.I, 'a': A(3).x}\n",
        "helper.py": "H = 1\n",
        "parts/__init__.py": "",
        "parts/inner.py": "I = 2\n",
    }
    module = make_module("several", files)
    assert runner.run(module).reply == {"h": 1, "i": 2, "a": 3}
    assert not list(Path(module["folder"]).rglob("__pycache__"))


def test_the_world_of_a_module(runner: Runner, make_module: MakeModule, tmp_path: Path) -> None:
    source = """
import os, signal, sys
def run(args, context):
    fds = {}
    for name in os.listdir('/proc/self/fd'):
        try:
            fds[name] = os.readlink(f'/proc/self/fd/{name}').partition(':')[0]
        except OSError:
            pass
    masks = {line.split(':')[0]: line.split()[1] for line in open('/proc/self/status') if line.startswith(('Sig', 'NoNew'))}
    os.close(os.open('mine', os.O_CREAT | os.O_WRONLY))
    return {'fds': fds, 'env': dict(os.environ), 'cwd': os.getcwd(), 'argv': sys.argv, 'path0': sys.path[0],
            'leader': os.getsid(0) == os.getpid(), 'masks': masks, 'mode': os.stat('mine').st_mode & 0o777,
            'instar': [p for p in sys.path if p.endswith('.pyz')], 'inherit': os.get_inheritable(3)}
"""
    module = make_module("world", {"main.py": source})
    for start in (runner.start, runner.warm().start):
        world = start({**ask(module), "cwd": str(tmp_path)}, Path("/")).finish().reply
        assert world["fds"] == {"0": "/dev/null", "1": "pipe", "2": "pipe", "3": "socket"}
        assert world["env"] == {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "HOME": str(tmp_path),
            "TMPDIR": str(tmp_path),
            "INSTAR_MODULE": "world",
        }
        assert (world["cwd"], world["leader"], world["mode"]) == (str(tmp_path), True, 0o700)
        assert world["argv"] == [f"{module['folder']}/main.py"]
        assert (world["path0"], world["instar"], world["inherit"]) == (module["folder"], [], False)
        pipe_and_size = (1 << 12) | (1 << 24)  # SIGPIPE and SIGXFSZ
        known = (1 << 31) - 1  # the C library's own signals, from 32 on, are as whoever started us left them
        assert int(world["masks"]["SigIgn"], 16) & known == pipe_and_size
        assert int(world["masks"]["SigBlk"], 16) == int(world["masks"]["SigCgt"], 16) == 0
        assert world["masks"]["NoNewPrivs"] == "1"
        (tmp_path / "mine").unlink()


# --- bad jobs


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{\n", "bad-job"),
        (b"[]\n", "bad-job"),
        (b"\xff\xff\n", "bad-job"),
        (b"[" * 100_000 + b"\n", "bad-job"),
        (b"x" * 300_000, "bad-job"),
        (b'{"v":2}\n', "bad-job"),
        (b'{"v":1,"do":"sing","module":{}}\n', "bad-job"),
        (b'{"v":1,"do":"run","module":7}\n', "bad-job"),
        (b'{"v":1,"do":"run","module":{"name":"selftest","builtin":true},"args":1}\n', "bad-job"),
        (b'{"v":1,"do":"run","module":{"name":"selftest","builtin":true},"limits":{"memory":"x"}}\n', "bad-job"),
        (b'{"v":1,"do":"run","module":{"name":"selftest","builtin":true},"limits":{"memory":NaN}}\n', "bad-job"),
        (b'{"v":1,"do":"run","module":{"name":"selftest","builtin":true},"cwd":"/does/not/exist"}\n', "bad-job"),
        (b'{"v":1,"do":"serve","module":{"name":"selftest","builtin":true}}\n', "bad-job"),
        (b'{"v":1,"do":"run","module":{"name":"../../etc/passwd","builtin":true}}\n', "unknown-module"),
        (b'{"v":1,"do":"run","module":{"name":"os","builtin":true}}\n', "unknown-module"),
        (b'{"v":1,"do":"run","module":{"name":"selftest","builtin":true},"args":{"nonce":"x"}}\n', "bad-nonce"),
    ],
)  # fmt: skip
def test_bad_jobs_are_refused(runner: Runner, line: bytes, code: str) -> None:
    end = runner.start(line).finish()
    assert (end.code, end.exit_code) == (code, 2)
    assert end.stderr


def test_an_agent_that_goes_away_is_not_waited_for(runner: Runner) -> None:
    child = runner.start(None)
    child.line.shutdown(1)
    end = child.finish()
    assert (end.lines, end.exit_code) == ([], 5)


def test_bad_command_lines(program: Program) -> None:
    import subprocess

    done = subprocess.run(program.command("runner"), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "descriptor 3" in done.stderr


# --- modules that cannot be loaded


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("def run(:\n", "not-loadable", "invalid syntax"),
        ("\0", "not-loadable", "null bytes"),
        ("x = 1\n", "no-symbol", "'run'"),
        ("run = 1\n", "no-symbol", "'run'"),
        ("import does_not_exist\n", "not-loadable", "does_not_exist"),
        ("raise SystemExit(0)\n", "not-loadable", "SystemExit"),
        ("1 / 0\n", "not-loadable", "ZeroDivisionError"),
        ("x = bytearray(1 << 30)\n", "out-of-memory", "limit"),
        ("(" * 5000 + ")" * 5000, "not-loadable", ""),
    ],
)
def test_modules_that_cannot_be_loaded(
    runner: Runner, make_module: MakeModule, source: str, code: str, words: str
) -> None:
    end = runner.run(make_module("bad", {"main.py": source}))
    assert end.code == code, end
    assert end.exit_code > 0
    assert words in end.answer["error"]["text"]
    assert end.answer["error"]["text"] in end.stderr


def test_a_file_that_is_not_there(runner: Runner, make_module: MakeModule) -> None:
    module = make_module("gone", {"main.py": GOOD}) | {"entry": "other.py"}
    assert runner.run(module).code == "not-loadable"


def test_a_service_needs_its_functions(runner: Runner, make_module: MakeModule) -> None:
    module = make_module("half", {"main.py": "def start(context): pass\n"}, mode="service")
    end = runner.start(ask(module, do="check")).finish()
    assert end.code == "no-symbol"
    assert "'request'" in end.answer["error"]["text"]


# --- replies that are none


@pytest.mark.parametrize(
    "line",
    [
        "return 7",
        "return [1]",
        "return 'text'",
        "return {'x': float('nan')}",
        "return {'x': float('inf')}",
        "return {'x': object()}",
        "return {'x': {1, 2}}",
        "return {('a',): 1}",
        "x = []; x.append(x); return {'x': x}",
        "x = {}; x['x'] = x; return x",
        "x = {}\n    for n in range(40): x = {'x': x}\n    return x",
        "x = []\n    for n in range(100000): x = [x]\n    return {'x': x}",
        "x = [1] * 10\n    for n in range(25): x = [x] * 10\n    return {'x': x}",
        "return {'x': 'y' * 300000}",
        "return {'x': 1 << 63}",
        "return {'x': 1 << 100000}",
        "context.put('x', object())",
        "class D(dict):\n        def items(self): raise KeyError('no')\n        def values(self): raise KeyError('no')\n    return {'x': D(a=1)}",
    ],
)
def test_replies_that_are_none(runner: Runner, make_module: MakeModule, line: str) -> None:
    end = runner.run(make_module("bad", body(line)))
    assert end.code in ("bad-reply", "module-failed"), end
    assert (end.code == "module-failed") == ("class D" in line)
    assert end.exit_code == 1
    assert len(end.lines) == 1


def test_half_a_character_does_not_spoil_the_line(runner: Runner, make_module: MakeModule) -> None:
    end = runner.run(make_module("half", body("return {'name': 'a\\udc80b', 'é': '\\u2028'}")))
    assert end.reply == {"name": "a?b", "é": "\u2028"}


# --- modules that fail


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("raise ValueError('no such thing')", "module-failed"),
        ("raise SystemExit(0)", "module-failed"),
        ("raise KeyboardInterrupt", "module-failed"),
        ("raise BaseException('x')", "module-failed"),
        ("raise GeneratorExit", "module-failed"),
        ("raise MemoryError", "out-of-memory"),
        ("return run(args, context)", "module-failed"),
        ("x = bytearray(1 << 30)", "out-of-memory"),
        ("x = []\n    while True: x.append(bytearray(1 << 20))", "out-of-memory"),
        ("class E(Exception):\n        def __str__(self): raise self\n    raise E", "module-failed"),
        ("import sys; sys.stdout = sys.stderr = None; raise ValueError", "module-failed"),
        ("import sys; sys.stdout.close(); sys.stderr.close(); raise ValueError", "module-failed"),
        ("import os; os.close(1); os.close(2); raise ValueError", "module-failed"),
        ("from concurrent.futures import ThreadPoolExecutor as T; T().submit(1/0)", "module-failed"),
    ],
)
def test_modules_that_fail(runner: Runner, make_module: MakeModule, line: str, code: str) -> None:
    end = runner.run(make_module("bad", body(line)), memory=128 << 20)
    assert (end.code, end.exit_code, end.signal) == (code, 1, 0), end
    assert len(end.lines) == 1


def test_the_reason_and_the_traceback_are_told(runner: Runner, make_module: MakeModule) -> None:
    end = runner.run(make_module("bad", body("raise ValueError('no such thing')")))
    assert "ValueError: no such thing" in end.answer["error"]["text"]
    assert "main.py" in end.stderr
    assert "Traceback" in end.stderr


@pytest.mark.parametrize(
    ("line", "exit_code", "signal"),
    [
        ("import os; os._exit(0)", 0, 0),
        ("import os; os._exit(3)", 3, 0),
        ("import os; os.kill(os.getpid(), 11)", 0, 11),
        ("import os; os.abort()", 0, 6),
        ("import os; os.killpg(0, 9)", 0, 9),
        ("import ctypes; ctypes.string_at(0)", 0, 11),
        ("import os; os.close(3); return {}", 1, 0),
        ("import os; os.closerange(3, 100); open('/dev/null'); return {}", 1, 0),
        ("import os; os.close(3); os.dup(2); return {'x': 1}", 1, 0),
    ],
)
def test_modules_that_end_without_a_reply(
    runner: Runner, make_module: MakeModule, line: str, exit_code: int, signal: int
) -> None:
    module = make_module("bad", body("print('last words')", line))
    for end in (runner.run(module), runner.warm().run(module)):
        assert (end.lines, end.exit_code, end.signal) == ([], exit_code, signal), end
        assert end.stderr.startswith("last words\n")


def test_prints_at_any_level_stay_out_of_the_line(runner: Runner, make_module: MakeModule) -> None:
    lines = ["import os, sys, subprocess", 'print(\'{"ok": true, "reply": {}}\')', "os.write(1, b'two\\n')"]
    lines += ["subprocess.run(['echo', 'three'])", "sys.stdout.write('\\udc80 four')", "return {'x': 1}"]
    end = runner.run(make_module("loud", body(*lines)))
    assert end.lines == [{"ok": True, "reply": {"x": 1}}]
    assert end.stderr == '{"ok": true, "reply": {}}\ntwo\nthree\n\\udc80 four'


def test_a_forked_child_that_comes_back_says_nothing(runner: Runner, make_module: MakeModule) -> None:
    lines = ["import os, time", "for n in range(3): os.fork() or (time.sleep(0.1 * n), os.getpid())"]
    lines += [
        "pid = os.getpid()",
        "if os.fork() == 0: raise SystemExit(0)",
        "time.sleep(0.5)",
        "return {'pid': pid}",
    ]
    child = runner.start(ask(make_module("forks", body(*lines))))
    end = child.finish()
    assert end.reply == {"pid": child.pid}
    assert len(end.lines) == 1


def test_children_and_threads_do_not_keep_it(runner: Runner, make_module: MakeModule) -> None:
    """The reply and the exit come at once; what is left of the group is the starter's to end."""
    lines = ["import subprocess, threading, time", "threading.Thread(target=time.sleep, args=(600,)).start()"]
    lines += ["pid = subprocess.Popen(['sleep', '600']).pid", "return {'pid': pid}"]
    module = make_module("children", body(*lines))
    for run in (runner.run, runner.warm().run):
        end = run(module)  # raises when it takes longer than WITHIN_S
        assert end.exit_code == 0
        assert gone(end.reply["pid"])


def gone(pid: int, within_s: float = 60.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


# --- modules that do not end


def test_a_hang_is_ended_by_whoever_started_it(runner: Runner, make_module: MakeModule) -> None:
    lines = [
        "import signal, time",
        "for n in range(1, 32):",
        "    if n not in (9, 19): signal.signal(n, signal.SIG_IGN)",
    ]
    child = runner.start(ask(make_module("hang", body(*lines, "context.log('in')", "time.sleep(600)"))))
    child.until("log")
    child.kill()
    end = child.finish()
    assert (end.signal, end.answer) == (9, {})


def test_a_hang_ends_by_itself_when_nobody_else_does(runner: Runner, make_module: MakeModule) -> None:
    end = runner.run(make_module("hang", body("while True: pass")), seconds=0.1)
    assert end.signal == 14  # SIGALRM, two seconds past the deadline


def test_endless_output_is_bounded(runner: Runner, make_module: MakeModule) -> None:
    end = runner.run(make_module("loud", body("while True: context.log('x' * 4000)")), output=100_000)
    assert (end.code, end.exit_code) == ("too-much-output", 1)
    assert len(end.raw) < 110_000
    quiet = body("try:", "    while True: context.log('x' * 4000)", "except Exception: return {'x': 1}")
    assert runner.run(make_module("quiet", quiet), output=100_000).code == "too-much-output"
    large = make_module("large", body("return {'x': 'y' * 5000}"))
    assert runner.run(large, output=4_000).code == "too-much-output"
    assert runner.run(large, output=0).reply["x"] == "y" * 5000


def test_endless_prints_are_the_starters_to_end(runner: Runner, make_module: MakeModule) -> None:
    child = runner.start(ask(make_module("loud", body("while True: print('x' * 60000)"))))
    seen = 0
    while seen < 5 << 20:
        seen += len(os.read(child.errors, 65_536))
    child.kill()
    assert child.finish().signal == 9


# --- state


def test_state_is_kept_durably(runner: Runner, make_module: MakeModule, tmp_path: Path) -> None:
    lines = ["old = context.load()", "n = (old or {'n': 0})['n'] + 1", "context.save({'n': n, 'é': 'ü'})"]
    module = make_module("count", body(*lines, "return {'n': n, 'data': str(context.data)}"))
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    for n in (1, 2, 3):
        assert runner.run(module, data=str(data)).reply == {"n": n, "data": str(data)}
    assert sorted(os.listdir(data)) == ["state.json"]
    assert (data / "state.json").stat().st_mode & 0o777 == 0o600
    (data / "state.json").write_bytes(b"\0\0{")
    end = runner.run(module, data=str(data))
    assert end.reply["n"] == 1
    assert "set aside" in end.said("log")[0]
    assert sorted(os.listdir(data)) == ["state.json", "state.json.unreadable"]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("context.save({'x': float('nan')})", "bad-state"),
        ("context.save([1])", "bad-state"),
        ("context.save({'x': object()})", "bad-state"),
        ("context.save({'x': 'y' * (17 << 20)})", "bad-state"),
        ("context.save({'x': 'y' * (2 << 20)})", "disk-failed"),  # over limits.disk
    ],
)
def test_state_that_cannot_be_kept(
    runner: Runner, make_module: MakeModule, tmp_path: Path, line: str, code: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "state.json").write_text('{"old": true}')
    end = runner.run(make_module("bad", body(line)), data=str(tmp_path / "data"), disk=1 << 20)
    assert end.code == code, end
    assert json.loads((tmp_path / "data" / "state.json").read_text()) == {"old": True}
    assert os.listdir(tmp_path / "data") == ["state.json"]


def test_without_a_data_folder_there_is_no_state(runner: Runner, make_module: MakeModule) -> None:
    assert runner.run(make_module("none", body("return {'x': context.load()}"))).reply == {"x": None}
    assert runner.run(make_module("none", body("context.save({})"))).code == "no-data"
