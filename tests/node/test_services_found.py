"""host.services: which manager an agent was started by, from evidence, and whom a node has for its services."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import instar
from instar.core.errors import MachineError
from instar.host import processes
from instar.host.clock import Clock
from instar.host.services import by_name, installed_for, services_of
from instar.host.services.base import call
from instar.host.services.detect import detect
from instar.host.services.runit import scanned_folder
from tests.node.world import Node

SOURCE = Path(instar.__file__).parents[1]
WITHIN_S = 60.0
METHODS = ("systemd", "sysv", "openrc", "runit", "supervisor", "keeper", "bare")


class Proc:
    """A /proc and a root of our making. The agent is this very process; its surroundings are told."""

    def __init__(self, node: Node, folder: Path) -> None:
        self.layout, self.clock, self.root = node.layout, Clock(), folder
        self.agent = processes.this_process(self.clock.boot_id())
        processes.record(self.layout.process("agent"), self.agent)
        self.put(self.agent.pid, parent=50)

    def put(
        self,
        pid: int,
        comm: str = "python3",
        parent: int = 1,
        cgroup: str = "0::/",
        line: str = "",
        env: str = "",
    ) -> None:
        place = self.root / "proc" / str(pid)
        place.mkdir(parents=True, exist_ok=True)
        (place / "stat").write_text(f"{pid} (a (b) c) S {parent} 1 1")
        (place / "comm").write_text(f"{comm}\n")
        (place / "cgroup").write_text(f"{cgroup}\n")
        (place / "cmdline").write_text("".join(f"{word}\0" for word in line.split()))
        (place / "environ").write_text("".join(f"{pair}\0" for pair in env.split()))

    def boots_with_systemd(self) -> None:
        (self.root / "run/systemd/system").mkdir(parents=True)

    def method(self, environ: dict[str, str] | None = None) -> str:
        return detect(self.layout, self.clock, environ, self.root / "proc", self.root)


@pytest.fixture
def proc(node: Node, tmp_path: Path) -> Proc:
    return Proc(node, tmp_path)


UNIT = "instar-agent.service"


@pytest.mark.parametrize(
    "cgroup",
    [
        f"0::/system.slice/{UNIT}",
        f"0::/system.slice/{UNIT}/agent",
        f"12:pids:/\n1:name=systemd:/system.slice/{UNIT}\n0::/",
    ],
)
def test_systemd_is_known_by_the_units_cgroup(proc: Proc, cgroup: str) -> None:
    proc.put(proc.agent.pid, cgroup=cgroup)
    assert proc.method() == "bare"  # such a name alone: systemd does not run here
    proc.boots_with_systemd()
    assert proc.method() == "systemd"


@pytest.mark.parametrize(
    "cgroup", ["0::/system.slice/ssh.service", f"0::/x{UNIT}", "0::/system.slice/instar-updater.service"]
)
def test_what_a_unit_hands_on_is_no_evidence(proc: Proc, cgroup: str) -> None:
    proc.boots_with_systemd()
    proc.put(proc.agent.pid, cgroup=cgroup, env="INVOCATION_ID=00ff JOURNAL_STREAM=1:2")
    assert proc.method() == "bare"


def test_runit_is_known_by_the_parent(proc: Proc) -> None:
    proc.put(50, comm="runsv")
    assert proc.method() == "runit"


@pytest.mark.parametrize(("line", "method"), [("/usr/bin/python3 /usr/bin/supervisord -n", "supervisor"),
                                              ("python3 -m supervisor.supervisord", "supervisor"), ("-bash", "bare")])  # fmt: skip
def test_supervisor_is_known_by_the_parent_and_the_environment(proc: Proc, line: str, method: str) -> None:
    proc.put(50, line=line)
    assert proc.method() == "bare"
    assert proc.method({"SUPERVISOR_ENABLED": "1"}) == method
    proc.put(proc.agent.pid, parent=50, env="SUPERVISOR_ENABLED=1")
    assert proc.method() == method


def test_with_no_agent_it_is_as_installed(node: Node) -> None:
    for manager in METHODS[:-1]:
        (node.layout.state / "service.json").write_text(json.dumps({"v": 1, "manager": manager}))
        assert detect(node.layout, Clock()) == manager


def test_nothing_readable_is_bare(proc: Proc) -> None:
    for path in (proc.root / "proc" / str(proc.agent.pid)).iterdir():
        path.unlink()
    assert proc.method() == "bare"


# --- which services


@pytest.mark.parametrize("name", METHODS)
def test_each_method_has_its_services(node: Node, name: str) -> None:
    assert by_name(name, node.layout, Clock()).name == name


@pytest.mark.parametrize("text", ['{"manager": "none"}', '{"manager": 7}', "{", "[]", '{"manager": "moon"}'])
def test_record_that_names_nobody_means_the_keeper(node: Node, text: str) -> None:
    (node.layout.state / "service.json").write_text(text)
    assert services_of(node.layout, Clock()).name == "keeper"


def test_record_is_absent(node: Node) -> None:
    with contextlib.suppress(FileNotFoundError):
        (node.layout.state / "service.json").unlink()
    assert installed_for(node.layout) == "keeper"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["no-such-program-here", "x"], "no-such-program-here is not on this machine; install it, or"),
        (["sh", "-c", "echo because; exit 3"], "ended with status 3: because"),
        (["sh", "-c", "exit 3"], "it said nothing"),
        (["sleep", "20"], "no answer within 0.2 s"),
        ([str(SOURCE), "x"], "Permission denied"),
    ],
)
def test_a_manager_that_fails_names_cause_and_way_out(words: list[str], part: str) -> None:
    with pytest.raises(MachineError) as caught:
        call(words, "start the agent", within_s=0.2 if words[0] == "sleep" else WITHIN_S)
    assert caught.value.code == f"{Path(words[0]).name}-failed"
    assert caught.value.text.startswith("cannot start the agent: ")
    assert part in caught.value.text


def test_a_manager_gets_no_settings_of_another() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from instar.host.services.base import call; print(call(['env'], 'x'))"
    words, environment = (
        [sys.executable, "-c", code, str(SOURCE)],
        {"SUPERVISOR_SERVER_URL": "unix:///x", "TERM": "x"},
    )
    said = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    assert "SUPERVISOR" not in said
    assert "TERM=x" in said
    assert "/sbin" in said


def test_runsvdir_says_which_folder_it_scans(tmp_path: Path) -> None:
    with pytest.raises(MachineError):
        scanned_folder(tmp_path)
    place = tmp_path / "77"
    place.mkdir()
    (place / "comm").write_text("runsvdir\n")
    (place / "cmdline").write_bytes(b"runsvdir\0-P\0/var/a service\0log: ....\0")
    assert scanned_folder(tmp_path) == Path("/var/a service")
