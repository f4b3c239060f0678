"""service.status: the answers of each manager, from files and words as the real ones write them.

The real managers are asked in tests/os/test_service_status.py.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import MODULES, Module

Get = Callable[[str], Module]
SHOW = """\
Id=cron.service
Description=Regular background program processing daemon
LoadState=loaded
ActiveState=active
SubState=running
MainPID=41
UnitFileState=enabled
NRestarts=2
Result=success
ExecMainStatus=0
ActiveEnterTimestampMonotonic=1000000

Id=bad.service
Description=Fails = always
LoadState=loaded
ActiveState=failed
SubState=failed
MainPID=0
UnitFileState=static
NRestarts=[not set]
Result=exit-code
ExecMainStatus=203
ActiveEnterTimestampMonotonic=0

Id=once.service
LoadState=loaded
ActiveState=active
SubState=exited
MainPID=0

Id=nope.service
LoadState=not-found
ActiveState=inactive
SubState=dead
MainPID=0
"""


@pytest.fixture(scope="module")
def module() -> Any:
    spec = importlib.util.spec_from_file_location(
        "service_status", MODULES / "service.status" / "services.py"
    )
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    spec.loader.exec_module(loaded)
    sys.dont_write_bytecode = before
    return loaded


def write(root: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def states(reply: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["state"] for one in reply["services"]}


class TestSystemd:
    @pytest.fixture
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A machine under systemd, whose systemctl says what `said` and `units` hold, and notes how it was asked."""
        (tmp_path / "run/systemd/system").mkdir(parents=True)
        write(
            tmp_path,
            {"said": SHOW, "units": "cron.service loaded active running Regular\nbad.service loaded\n"},
        )
        (tmp_path / "bin").mkdir()
        program = tmp_path / "bin/systemctl"
        program.write_text(
            f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\ncase "$*" in *list-units*) cat {tmp_path}/units;; '
            f"*) cat {tmp_path}/said;; esac\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        return tmp_path

    def test_each_state(self, module: Any, root: Path) -> None:
        reply = module.run({"names": ["cron", "bad", "once", "nope"]}, None, root)
        assert reply["manager"] == "systemd"
        assert states(reply) == {"cron": "running", "bad": "failed", "once": "finished", "nope": "not-found"}
        bad, cron = reply["services"][0], reply["services"][1]
        assert (bad["result"], bad["exit_status"], bad["restarts"], bad["description"]) == (
            "exit-code", 203, 0, "Fails = always",
        )  # fmt: skip
        assert (cron["pid"], cron["enabled"], cron["restarts"]) == (41, "enabled", 2)
        assert cron["for_s"] > 0
        assert "-- cron.service bad.service once.service nope.service" in (root / "asked").read_text()

    def test_all_and_only_failed(self, module: Any, root: Path) -> None:
        reply = module.run({}, None, root)
        assert states(reply) == {"cron": "running", "bad": "failed", "once": "finished"}
        assert states(module.run({"failed": True}, None, root)) == {"bad": "failed"}
        assert "--state=failed" in (root / "asked").read_text().splitlines()[-2]

    def test_nothing_failed(self, module: Any, root: Path) -> None:
        write(root, {"units": "\n"})
        assert module.run({"failed": True}, None, root)["services"] == []

    def test_a_bus_that_is_down(self, module: Any, root: Path) -> None:
        write(
            root, {"bin/systemctl": "#!/bin/sh\necho 'Failed to connect to bus: No such file' >&2\nexit 1\n"}
        )
        with pytest.raises(OSError, match=r"cannot ask systemd: Failed to connect to bus"):
            module.run({"names": ["cron"]}, None, root)

    def test_a_systemctl_that_hangs(self, module: Any, root: Path) -> None:
        write(root, {"bin/systemctl": "#!/bin/sh\nexec sleep 60\n"})
        before, module.ANSWER_S = module.ANSWER_S, 0.3
        try:
            with pytest.raises(OSError, match=r"expected an answer within 0\.3 s, got none"):
                module.run({"names": ["cron"]}, None, root)
        finally:
            module.ANSWER_S = before

    def test_many_units_are_asked_in_parts(self, module: Any, root: Path) -> None:
        write(root, {"units": "".join(f"u{number}.service loaded\n" for number in range(250))})
        module.run({}, None, root)
        asked = (root / "asked").read_text().splitlines()
        assert [line.count(".service") for line in asked[1:]] == [100, 100, 50]


def test_openrc(module: Any, tmp_path: Path) -> None:
    files = {f"etc/init.d/{name}": "" for name in ("sshd", "crond", "broken", "late", "off", "crashed")}
    marks = {
        "started/sshd": "", "started/crond": "", "failed/broken": "", "starting/late": "", "started/crashed": "",
        "softlevel": "default",
        "daemons/sshd/001": "exec=/usr/sbin/sshd\npidfile=/run/sshd.pid\n",
        "daemons/crashed/001": "exec=/x\npidfile=/run/crashed.pid\n",
    }  # fmt: skip
    pids = {"run/sshd.pid": "812\n", "run/crashed.pid": "813\n", "proc/812/stat": "812 (ssh d) S 1"}
    write(tmp_path, files | {f"run/openrc/{name}": content for name, content in marks.items()} | pids)
    for name in files:
        (tmp_path / name).chmod(0o755)
    reply = module.run({}, None, tmp_path)
    assert reply["manager"] == "openrc"
    assert states(reply) == {
        "sshd": "running", "crond": "running", "broken": "failed", "late": "starting", "off": "stopped",
        "crashed": "failed",
    }  # fmt: skip
    assert next(one["pid"] for one in reply["services"] if one["name"] == "sshd") == 812
    assert states(module.run({"names": ["nope", "off"]}, None, tmp_path)) == {
        "nope": "not-found",
        "off": "stopped",
    }
    assert set(states(module.run({"failed": True}, None, tmp_path))) == {"broken", "crashed"}


def test_runit(module: Any, tmp_path: Path) -> None:
    def status(pid: int, want: str, state: int) -> bytes:
        return bytes(12) + pid.to_bytes(4, "little") + b"\0" + want.encode() + b"\0" + bytes((state,))

    raw = {
        "up": status(77, "u", 1),
        "off": status(0, "d", 0),
        "dies": status(0, "u", 0),
        "new": b"",
        "ends": status(5, "d", 2),
    }
    write(tmp_path, {f"etc/service/{name}/supervise/status": content for name, content in raw.items()})
    write(
        tmp_path, {"proc/1/comm": "init\n", "proc/55/comm": "runsvdir\n", "etc/service/README": "no service"}
    )
    reply = module.run({}, None, tmp_path)
    assert reply["manager"] == "runit"
    assert states(reply) == {
        "up": "running", "off": "stopped", "dies": "failed", "new": "unknown", "ends": "stopping",
    }  # fmt: skip
    assert next(one["pid"] for one in reply["services"] if one["name"] == "up") == 77
    assert states(module.run({"names": ["nope"]}, None, tmp_path)) == {"nope": "not-found"}


def test_sysv(module: Any, tmp_path: Path) -> None:
    names = ("cron", "dead", "silent", "README", "x.dpkg-old")
    write(
        tmp_path,
        {f"etc/init.d/{name}": "" for name in names}
        | {"proc/1/comm": "init\n", "proc/9/stat": "9 (cron) S 1"},
    )
    write(tmp_path, {"run/crond.pid": "9", "run/dead.pid": "10\n"})
    for name in names:
        (tmp_path / "etc/init.d" / name).chmod(0o755)
    reply = module.run({}, None, tmp_path)
    assert reply["manager"] == "sysv"
    assert states(reply) == {"cron": "running", "dead": "failed", "silent": "unknown"}


def test_no_manager(module: Any, tmp_path: Path) -> None:
    write(tmp_path, {"proc/1/comm": "my-app\n"})
    reply = module.run({"names": ["cron"]}, None, tmp_path)
    assert reply["manager"] == "none"
    assert reply["text"] == (
        "no service manager was found: expected systemd, openrc, runit or sysv, process 1 is 'my-app'"
    )
    assert states(reply) == {"cron": "unknown"}
    assert module.run({}, None, tmp_path)["services"] == []


class TestInARunner:
    def test_this_machine(self, first_day: Get) -> None:
        reply = first_day("service.status").run({"names": ["cron", "no-such-thing"]}).reply
        assert reply["manager"] in ("systemd", "openrc", "runit", "sysv", "none")
        assert [one["name"] for one in reply["services"]] == ["cron", "no-such-thing"]
        assert reply["manager"] != "none" or "process 1 is" in reply["text"]

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            ({"names": ["--help"]}, "expected a service's name, got '--help'"),
            ({"names": ["a b"]}, "got 'a b'"),
            ({"names": ["*"]}, "got '*'"),
            ({"names": ["../../x"]}, "expected a service's name"),
            ({"names": ["x\n"]}, "expected a service's name"),
            ({"names": [".."]}, "expected a service's name"),
            ({"names": [7]}, "got 7"),
            ({"names": {}}, "expected a list"),
            ({"names": ["x"] * 101}, "at most 100"),
            ({"failed": "no"}, "expected true or false as 'failed'"),
            ({"name": "ssh"}, "expected 'names' or 'failed', got 'name'"),
        ],
    )
    def test_wrong_arguments(self, first_day: Get, args: dict[str, Any], words: str) -> None:
        assert words in first_day("service.status").error(args)
