"""What holds a module: the kernel's limits, Landlock, another user. Each test breaks one of them."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from instar.host.interpreter import FLAGS
from instar.runner import landlock
from instar.runner.kinds import Limits
from instar_lab import machine
from tests.runner.conftest import LIMITS, MakeModule, Runner, ask
from tests.runner.test_hostile import alive
from tests.runner.test_python import body, gone

USER = "nobody"
MIB = 1 << 20
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
fenced = pytest.mark.skipif(landlock.version() < 1, reason="this kernel has no Landlock")


@pytest.fixture(params=["cold", "warm"])
def run(request: pytest.FixtureRequest, runner: Runner) -> Any:
    return runner.run if request.param == "cold" else runner.warm().run


def test_the_tests_know_all_limits() -> None:
    assert set(LIMITS) == set(Limits._fields)


def test_memory(run: Any, make_module: MakeModule) -> None:
    module = make_module("large", body("x = b'x' * args['bytes']", "return {'n': len(x)}"))
    assert run(module, {"bytes": 48 * MIB}, memory=64 * MIB).reply == {"n": 48 * MIB}
    end = run(module, {"bytes": 80 * MIB}, memory=64 * MIB)
    assert (end.code, end.exit_code) == ("out-of-memory", 1)
    assert run(module, {"bytes": 80 * MIB}, memory=0).reply == {"n": 80 * MIB}


def test_too_little_memory_for_anything(run: Any, make_module: MakeModule) -> None:
    end = run(make_module("any", body("return {}")), memory=1)
    assert end.code == "out-of-memory" or end.answer["ok"]
    assert end.signal == 0


def test_processor_time(run: Any, make_module: MakeModule) -> None:
    end = run(make_module("busy", body("while True: pass")), cpu_s=1)
    assert (end.signal, end.answer) == (24, {})  # SIGXCPU


def test_open_files(run: Any, make_module: MakeModule) -> None:
    lines = ["kept = []", "try:", "    while True: kept.append(open('/dev/null'))"]
    lines += ["except OSError as error: return {'n': len(kept), 'errno': error.errno}"]
    assert run(make_module("files", body(*lines)), files=20).reply == {"n": 16, "errno": 24}


def test_size_of_a_file(run: Any, make_module: MakeModule) -> None:
    lines = ["try:", "    with open('f', 'wb', 0) as f:", "        while True: f.write(b'x' * 65536)"]
    lines += [
        "except OSError as error:",
        "    import os; return {'n': os.stat('f').st_size, 'errno': error.errno}",
    ]
    assert run(make_module("disk", body(*lines)), disk=MIB).reply == {"n": MIB, "errno": 27}


def test_no_core_is_left(run: Any, make_module: MakeModule, runner: Runner) -> None:
    assert run(make_module("dies", body("import os", "os.abort()"))).signal == 6
    assert os.listdir(runner.cwd) == []


def test_limits_cannot_be_raised(run: Any, make_module: MakeModule) -> None:
    source = body("import resource", "return {'files': resource.getrlimit(resource.RLIMIT_NOFILE)}")
    assert run(make_module("hard", source), files=20).reply == {"files": [20, 20]}


# --- where it may write


@fenced
def test_it_writes_where_it_may_and_nowhere_else(run: Any, make_module: MakeModule, tmp_path: Path) -> None:
    data, shared, other = tmp_path / "data", tmp_path / "shared", tmp_path / "other"
    for folder in (data, shared, other):
        folder.mkdir()
    (other / "old").write_text("old")
    source = """
import os, subprocess
def attempt(call):
    try:
        call()
        return 'ok'
    except OSError as error:
        return error.errno
def run(args, context):
    found = {path: attempt(lambda: open(path + '/f', 'w').close()) for path in args['paths']}
    old = args['paths'][-1] + '/old'
    found['truncate'] = attempt(lambda: os.truncate(old, 3))
    found['remove'] = attempt(lambda: os.unlink(old))
    found['rename'] = attempt(lambda: os.rename(old, old + '2'))
    found['null'] = attempt(lambda: open('/dev/null', 'w').close())
    found['read'] = open(old).read()
    found['child'] = subprocess.run(['touch', old + '3'], capture_output=True).returncode
    return found
"""
    module = make_module("writes", {"main.py": source})
    paths = [".", str(data), str(shared), str(other)]
    given = {"write": [str(shared), "/does/not/exist"]}
    reply = run(module, {"paths": paths}, data=str(data), touches=given).reply
    assert reply == {
        **dict.fromkeys(paths[:3], "ok"),
        paths[3]: 13,
        "truncate": 13 if landlock.version() >= 3 else "ok",
        "remove": 13,
        "rename": 13,
        "null": "ok",
        "read": "old",
        "child": 1,
    }


@pytest.mark.skipif(landlock.version() < 4, reason="this kernel's Landlock knows nothing of TCP")
def test_the_network_is_for_those_who_ask(run: Any, make_module: MakeModule) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        lines = ["import socket", "try: socket.create_connection(('127.0.0.1', args['port'])).close()"]
        lines += ["except OSError as error: return {'errno': error.errno}", "return {'errno': 0}"]
        module = make_module("net", body(*lines))
        port = listener.getsockname()[1]
        assert run(module, {"port": port}).reply == {"errno": 13}
        assert run(module, {"port": port}, touches={"network": True}).reply == {"errno": 0}


# --- as whom it runs

WHO = """
import os
def run(args, context):
    context.save({'n': (context.load() or {'n': 0})['n'] + 1})
    open('mine', 'w').close()
    import helper
    name = os.environ['TMPDIR'] + '/mine'
    os.remove(name)
    try:
        os.setuid(0)
        back = True
    except OSError:
        back = False
    return {'ids': [*os.getresuid(), *os.getresgid()], 'groups': os.getgroups(), 'back': back,
            'made': name.startswith('/proc/self/cwd/'), 'state': context.load(), 'helper': helper.X, 'data': os.listdir(context.data)}
"""


@root
def test_another_user_below_closed_folders(run: Any, make_module: MakeModule, tmp_path: Path) -> None:
    """Its files, its data and the program lie below folders that only root can enter."""
    tmp_path.chmod(0o700)
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    (data / "state.json").write_text('{"n": 4}')
    module = make_module("who", {"main.py": WHO, "helper.py": "X = 1\n"})
    entry = pwd.getpwnam(USER)
    for n in (5, 6):
        reply = run(module, data=str(data), user=USER).reply
        assert reply["ids"] == [entry.pw_uid] * 3 + [entry.pw_gid] * 3
        assert 0 not in reply["groups"]
        assert (reply["back"], reply["helper"], reply["state"]) == (False, 1, {"n": n})
        assert reply["made"]
        assert reply["data"] == ["state.json"]
    assert data.stat().st_uid == (data / "state.json").stat().st_uid == entry.pw_uid


@root
def test_links_in_the_data_folder_give_nothing_away(
    run: Any, make_module: MakeModule, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_text("root's")
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    (data / "link").symlink_to(target)
    assert run(make_module("any", body("return {}")), data=str(data), user=USER).reply == {}
    assert target.stat().st_uid == 0
    assert (data / "link").lstat().st_uid == pwd.getpwnam(USER).pw_uid


@root
def test_a_failure_as_another_user_is_told(run: Any, make_module: MakeModule) -> None:
    end = run(make_module("bad", body("raise ValueError('x')")), user=USER)
    assert end.code == "module-failed"
    assert "ValueError" in end.stderr


def test_a_user_that_there_is_not(run: Any, make_module: MakeModule) -> None:
    end = run(make_module("any", body("return {}")), user="no-such-user")
    assert (end.code, end.exit_code) == ("no-user", 4)


@root
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs an interpreter that all may run")
def test_a_starter_that_is_not_root(runner: Runner, make_module: MakeModule) -> None:
    """Then the user stays the same, and nobody can be switched to."""
    uid = pwd.getpwnam(USER).pw_uid
    with tempfile.TemporaryDirectory(prefix="instar-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        program = shutil.copy(runner.program.path, folder / "instar.pyz")
        (folder / "main.py").write_text("import os\ndef run(args, context): return {'uid': os.getuid()}\n")
        (folder / "cwd").mkdir()
        module = make_module("any", {"main.py": ""}) | {"folder": name}
        command = ["/usr/bin/python3", *FLAGS, str(program), "runner"]
        assert runner.start(ask(module), folder / "cwd", uid, command).finish().reply == {"uid": uid}
        end = runner.start(ask(module, user="root"), folder / "cwd", uid, command).finish()
        assert end.code == "no-user"


# --- fork bombs: each process of them ends by itself, too, and none begins without a limit

FUSE = """
import os, resource, signal, time
def run(args, context):
    assert os.getuid() and resource.getrlimit(resource.RLIMIT_NPROC)[1] < 4000
    signal.alarm(5)
    n = 0
    while True:
        try:
            if n < 1000 and os.fork() == 0:
                signal.alarm(3)
                if not args.get("spread"):
                    time.sleep(60)
            n += 1
        except OSError as error:
            if not args.get("spread"):
                return {'n': n, 'errno': error.errno, 'pid': os.getpid()}
"""


@root
def test_a_fork_bomb_of_another_user_stops_at_its_limit(run: Any, make_module: MakeModule) -> None:
    reply = run(make_module("forks", {"main.py": FUSE}), user=USER, processes=12).reply
    assert reply["errno"] == 11
    assert reply["n"] <= 12
    assert_none_left(reply["pid"])


@root
def test_a_fork_bomb_without_an_end_is_ended(runner: Runner, make_module: MakeModule) -> None:
    module = make_module("bomb", {"main.py": FUSE})
    child = runner.start(ask(module, {"spread": True}, user=USER, processes=12))
    time.sleep(0.3)
    child.kill()
    assert child.finish().signal == 9
    assert gone(child.pid)
    assert_none_left(child.pid)


def assert_none_left(group: int) -> None:
    """No process of a runner's group runs any more; others on this machine may be USER's, too."""
    machine.wait_for(
        lambda: not alive(group), "the end of all", 60.0, lambda: f"{alive(group)}", every_s=0.02
    )
