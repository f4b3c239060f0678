"""host.services and cli.scripts: how the agent was started, and restarts by hand with real processes.

The managers themselves are in tests/os/test_run_methods.py, with the real thing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import instar
from instar.cli import scripts
from instar.core.errors import InputError, MachineError
from instar.host import processes
from instar.host.clock import Clock
from instar.host.interpreter import FLAGS
from instar.host.layout import LINES, Layout
from instar.host.line import Line
from instar.host.services import ByHand, by_name, installed_for, running, services_of
from instar.host.services.bare import Bare, further
from instar.host.services.base import RoleLockProbe, call
from instar.host.services.detect import detect
from instar.host.services.runit import scanned_folder
from instar_lab import machine
from tests.node.world import Node, build, put

SOURCE = Path(instar.__file__).parents[1]
LAUNCHER = """
import sys
sys.path.insert(0, {source!r})
from instar.recovery import keep, launch
sys.exit({{"launch": launch, "keep": keep}}[sys.argv[1]].main(sys.argv[2:]))
"""
# Its lock is what the others wait for: all the rest is done by then.
STEADY = """
import fcntl, os, signal, sys, time
state = sys.argv[sys.argv.index("--state") + 1]
role = sys.argv[1]
def end(*_):
    with open(f"{state}/run/{role}.ends", "a") as log:
        log.write(f"{os.getpid()}\\n")
    time.sleep(0.1)
    os._exit(0)
signal.signal(signal.SIGTERM, end)
print("words", *sys.argv[1:], os.environ.get("OF_MINE"), file=sys.stderr, flush=True)
with open(f"{state}/run/{role}.starts", "a") as log:
    log.write(f"{os.getpid()}\\n")
lock = os.open(f"{state}/run/{role}.lock", os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(lock, fcntl.LOCK_EX)
time.sleep(120)
"""
WITHIN_S = 60.0
METHODS = ("systemd", "sysv", "openrc", "runit", "supervisor", "keeper", "bare")
ODD = Path('/srv/a node\'s $HOME; 100% #1 "x"')


class Hand:
    """A node whose agent somebody starts by hand."""

    def __init__(self, node: Node, text: str = STEADY) -> None:
        self.layout, self.clock = node.layout, Clock()
        self.layout.launcher.parent.mkdir(parents=True, exist_ok=True)
        self.layout.launcher.write_text(LAUNCHER.format(source=str(SOURCE)))
        built = build("2.0.0", text)
        for role in LINES:
            line = Line(self.layout.line(role))
            put(line, built)
            line.activate(built.name, fallback="")

    def begin(self, *options: str, log: Path | None = None) -> subprocess.Popen[bytes]:
        state = str(self.layout.state)
        words = [
            sys.executable,
            *FLAGS,
            str(self.layout.launcher),
            "launch",
            "agent",
            "--state",
            state,
            *options,
        ]
        with (log or self.layout.run / "terminal").open("ab") as file:
            begun = subprocess.Popen(words, stderr=file, stdout=file, env={**os.environ, "OF_MINE": "kept"})
        probe = RoleLockProbe(self.layout.role_lock("agent"))
        machine.wait_for(
            lambda: self.pids()[-1:] == [begun.pid] and probe.held(), "an agent", WITHIN_S, every_s=0.01
        )
        return begun

    def pids(self, what: str = "starts", role: str = "agent") -> list[int]:
        try:
            return [int(line) for line in (self.layout.run / f"{role}.{what}").read_text().split()]
        except FileNotFoundError:
            return []

    def alive(self, role: str = "agent") -> list[int]:
        return [pid for pid in dict.fromkeys(self.pids(role=role)) if processes.start_time(pid) is not None]

    def bare(self) -> Bare:
        return Bare(self.layout, self.clock)

    def method(self) -> str:
        return detect(self.layout, self.clock)


@pytest.fixture
def hand(node: Node) -> Iterator[Hand]:
    made = Hand(node)
    yield made
    machine.end_all_naming(node.layout.state, grace_s=1.0)


# --- by hand, without a keeper


def test_by_hand_the_old_one_ends_before_the_new_one_runs_as_it_did(hand: Hand) -> None:
    log = hand.layout.run / "mine.log"
    old = hand.begin("--log", "json", log=log)
    assert hand.method() == "bare"
    running(hand.layout, hand.clock).restart("agent")
    assert old.wait(WITHIN_S) == 0
    new = processes.recorded(hand.layout.process("agent"))
    assert new is not None
    assert hand.alive() == [new.pid]
    assert hand.pids("ends") == [old.pid]
    assert os.getsid(new.pid) == new.pid
    machine.wait_for(
        lambda: log.read_text().count("words") == 2, "its words", WITHIN_S, log.read_text, every_s=0.01
    )
    first, second = log.read_text().splitlines()
    assert first == second == f"words agent --state {hand.layout.state} --log json kept"
    assert hand.method() == "bare"


def test_by_hand_two_at_once_make_no_two(hand: Hand) -> None:
    hand.begin()
    most = 0
    callers = [threading.Thread(target=hand.bare().restart, args=("agent",)) for _ in range(4)]
    for caller in callers:
        caller.start()
    while any(caller.is_alive() for caller in callers):
        most = max(most, len(hand.alive()))
        time.sleep(0.002)
    assert most == 1
    assert len(hand.alive()) == 1
    assert len(hand.pids()) == 5  # one after the other
    assert set(hand.pids("ends")) == set(hand.pids()[:-1])


def test_by_hand_start_and_stop_change_nothing_the_second_time(hand: Hand) -> None:
    bare = hand.bare()
    bare.start("agent")
    bare.start("agent")
    assert len(hand.pids()) == 1
    bare.stop("agent")
    bare.stop("agent")
    assert hand.alive() == []
    bare.restart("agent")
    assert len(hand.alive()) == 1


def test_by_hand_killed_in_between_the_next_one_starts_it(hand: Hand) -> None:
    """The restart's own process dies after the old agent's end; the lock goes with it."""
    old = hand.begin()
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from instar.host.clock import Clock\n"
        "from instar.host.layout import Layout\n"
        "from instar.host.services.bare import Bare\n"
        "class Dying(Bare):\n"
        "    def _start(self, role, start): os.kill(os.getpid(), 9)\n"
        "Dying(Layout(Path(sys.argv[2])), Clock()).restart('agent')\n"
    )
    died = subprocess.run(
        [sys.executable, "-c", code, str(SOURCE), str(hand.layout.state)], check=False, timeout=WITHIN_S
    )
    assert died.returncode == -signal.SIGKILL
    assert old.wait(WITHIN_S) == 0
    assert hand.alive() == []
    hand.bare().restart("agent")
    assert len(hand.alive()) == 1


def test_by_hand_a_new_one_that_ends_is_told(node: Node) -> None:
    hand = Hand(node, "import sys; sys.exit('broken')")
    with pytest.raises(MachineError) as caught:
        hand.bare().start("agent")
    assert caught.value.code == "not-started"
    assert "status 1" in caught.value.text
    assert "broken" in (hand.layout.run / "agent.log").read_text()


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("python3 -I /x/instar.pyz agent --state /s", ""),
        ("python3 -I -S -X no_debug_ranges /x/instar.pyz agent --state /s --log json", "--log json"),
        ("python3 instar.pyz agent --log json --state /s --lock-within 3", "--log json --lock-within 3"),
        ("./instar.pyz launch agent --state /s", ""),
        ("something else", ""),
        ("instar.pyz agent --state", ""),
    ],
)
def test_further_words(line: str, kept: str) -> None:
    assert further(line.split()) == kept.split()


# --- by our keeper


def keep(hand: Hand, *options: str) -> subprocess.CompletedProcess[str]:
    words = [
        sys.executable,
        *FLAGS,
        str(hand.layout.launcher),
        "keep",
        "--state",
        str(hand.layout.state),
        *options,
    ]
    return subprocess.run(words, capture_output=True, text=True, timeout=WITHIN_S, check=False)


@pytest.mark.parametrize(
    ("by", "method"), [((), "keeper"), (("--by", "sysv"), "sysv"), (("--by", "openrc"), "openrc")]
)
def test_keeper_as_scripts_use_it(hand: Hand, by: tuple[str, ...], method: str) -> None:
    assert (keep(hand, "--check").returncode, keep(hand, *by, "--end").returncode) == (3, 0)
    assert keep(hand, *by, "--detach").returncode == 0
    machine.wait_for(lambda: all(hand.alive(role) for role in LINES), "both", WITHIN_S, every_s=0.01)
    assert keep(hand, "--check").stdout == "instar is running\n"
    assert hand.method() == method
    assert keep(hand, *by, "--detach").returncode == 0  # once more: nothing happens
    old, other = hand.alive(), hand.alive("updater")
    by_name("keeper", hand.layout, hand.clock).restart("agent")
    machine.wait_for(lambda: hand.alive() not in ([], old), "a new agent", WITHIN_S, every_s=0.01)
    assert hand.alive("updater") == other
    assert hand.method() == method

    keeper = processes.recorded(hand.layout.process("keep"))
    assert keeper is not None
    os.kill(keeper.pid, signal.SIGKILL)  # the agent runs on, kept by nobody
    machine.wait_for(lambda: processes.start_time(keeper.pid) is None, "its end", WITHIN_S, every_s=0.01)
    assert hand.method() == "bare"
    assert keep(hand, *by, "--detach").returncode == 0
    assert hand.method() == method  # adopted: the keeper is not its parent
    assert keep(hand, *by, "--end").returncode == 0
    assert [hand.alive(role) for role in LINES] == [[], []]
    assert keep(hand, "--check").returncode == 3


def test_keeper_that_takes_its_time_is_waited_for(hand: Hand) -> None:
    """On a small machine that has just booted."""
    hand.layout.launcher.write_text(f"import time\ntime.sleep(3.5)\n{hand.layout.launcher.read_text()}")
    assert keep(hand, "--detach").returncode == 0
    assert keep(hand, "--end").returncode == 0


def test_keeper_that_is_not_recorded_yet_is_ended_too(hand: Hand) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from instar.host import processes\n"
        "from instar.host.clock import Clock\n"
        "from instar.host.layout import Layout\n"
        "from instar.host.locks import RoleLock\n"
        "layout = Layout(Path(sys.argv[2]))\n"
        "with RoleLock(layout.role_lock('keep')) as lock:\n"
        "    lock.acquire(1.0); print('up', flush=True); time.sleep(0.5)\n"
        "    processes.record(layout.process('keep'), processes.this_process(Clock().boot_id()))\n"
        "    time.sleep(120)\n"
    )
    words = [sys.executable, "-c", code, str(SOURCE), str(hand.layout.state)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as keeper:
        try:
            assert keeper.stdout is not None
            assert keeper.stdout.readline() == b"up\n"
            ByHand(hand.layout, hand.clock).end_keeper()
            assert keeper.poll() == -signal.SIGTERM
        finally:
            keeper.kill()


def test_keeper_that_cannot_start_is_told(hand: Hand) -> None:
    hand.layout.launcher.unlink()
    code = "import sys; sys.path.insert(0, sys.argv[1]); from instar.recovery.keep import main; sys.exit(main(sys.argv[2:]))"
    words = [sys.executable, "-c", code, str(SOURCE), "--state", str(hand.layout.state), "--detach"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    assert done.returncode == 4
    assert "keeper.log" in done.stderr


@pytest.mark.parametrize(
    "words", [[], ["--state"], ["--state", "/x", "--moon"], ["--by", "sysv"], ["--detach"]]
)
def test_keeper_refuses_bad_words(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from instar.recovery import keep as module

    assert module.main(words) == 2
    assert "usage: instar keep" in capsys.readouterr().err


# --- how it was started, by evidence


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


# --- scripts


@pytest.mark.parametrize("manager", ["sysv", "openrc", "runit"])
def test_scripts_are_good_shell_for_any_path(manager: str, tmp_path: Path) -> None:
    for path, (text, mode) in scripts.filled(manager, Layout(ODD), tmp_path).items():
        assert mode == 0o755, path
        subprocess.run(["sh", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize("role", LINES)
def test_run_script_starts_the_launcher_with_the_very_path(role: str, tmp_path: Path) -> None:
    state = tmp_path / ODD.name
    text, _ = scripts.filled("runit", Layout(state), tmp_path)[tmp_path / f"etc/sv/instar-{role}/run"]
    launcher = Layout(state).launcher
    launcher.parent.mkdir(parents=True)
    launcher.write_text("import sys; print(sys.argv[1:])")
    said = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True).stdout
    assert said == f"{['launch', role, '--state', str(state)]}\n"


def test_openrc_script_survives_being_evaluated_twice(tmp_path: Path) -> None:
    layout = Layout(ODD)
    ((text, _),) = scripts.filled("openrc", layout, tmp_path).values()
    values = "\n".join(line for line in text.splitlines() if line.startswith(("command", "output_log")))
    twice = values + "\neval printf \"%s'\\n'\" $command $command_args $output_log"
    said = subprocess.run(["sh", "-c", twice], capture_output=True, text=True, check=True).stdout.splitlines()
    words = [sys.executable, *FLAGS, str(layout.launcher), "keep", "--state", str(ODD), "--by", "openrc"]
    assert said == [*words, str(layout.run / "keeper.log")]


def test_supervisor_sections(tmp_path: Path) -> None:
    import configparser

    state = Path("/srv/a node's $HOME")
    ((path, (text, _)),) = scripts.filled("supervisor", Layout(state), tmp_path).items()
    assert path == tmp_path / "etc/supervisor/conf.d/instar.conf"
    read = configparser.RawConfigParser(inline_comment_prefixes=(";", "#"))  # as supervisor reads
    read.read_string(text)
    assert read.sections() == [f"program:instar-{role}" for role in LINES]
    for role in LINES:
        section = read[f"program:instar-{role}"]
        assert shlex.split(section["command"])[-4:] == ["launch", role, "--state", str(state)]
        assert section["stdout_logfile"] == f"{state}/run/{role}.log"
    (tmp_path / "etc/supervisord.d").mkdir(parents=True)
    assert list(scripts.filled("supervisor", Layout(state), tmp_path)) == [
        tmp_path / "etc/supervisord.d/instar.ini"
    ]


@pytest.mark.parametrize(
    ("manager", "path"),
    [
        ("systemd", "/a\nb"),
        ("sysv", "/a\tb"),
        ("supervisor", "/a #b"),
        ("supervisor", "/a;b"),
        ("supervisor", "/50%"),
    ],
)
def test_paths_that_a_manager_cannot_write_down(manager: str, path: str) -> None:
    with pytest.raises(InputError) as caught:
        scripts.check_path(manager, Path(path))
    assert caught.value.code == "bad-path"


@pytest.mark.parametrize("manager", ["systemd", "sysv", "openrc", "runit"])
def test_paths_that_it_can(manager: str) -> None:
    scripts.check_path(manager, ODD)


def machine_with(root: Path, first: str, *others: str) -> Path:
    for pid, name in enumerate((first, *others), 1):
        (root / f"proc/{pid}").mkdir(parents=True)
        (root / f"proc/{pid}/comm").write_text(f"{name}\n")
    (root / "etc/init.d").mkdir(parents=True)
    (root / "usr/sbin").mkdir(parents=True)
    for program in ("service", "sv", "supervisorctl"):
        (root / "usr/sbin" / program).touch()
    return root


@pytest.mark.parametrize(
    ("first", "others", "manager"),
    [
        ("init", (), "sysv"),
        ("init", ("supervisord",), "sysv"),
        ("runit", ("runsvdir",), "runit"),
        ("sh", ("runsvdir",), "runit"),
        ("tini", ("supervisord", "bash"), "supervisor"),
        ("supervisord", (), "supervisor"),
        ("bash", ("sshd",), "none"),
    ],
)
def test_what_the_machine_has(tmp_path: Path, first: str, others: tuple[str, ...], manager: str) -> None:
    assert scripts.found(machine_with(tmp_path, first, *others)) == manager


def test_what_the_machine_has_openrc(tmp_path: Path) -> None:
    root = machine_with(tmp_path, "init", "supervisord")
    (root / "run/openrc").mkdir(parents=True)
    (root / "run/openrc/softlevel").touch()
    assert scripts.found(root) == "openrc"


def test_sysv_needs_its_service_program(tmp_path: Path) -> None:
    root = machine_with(tmp_path, "init")
    (root / "usr/sbin/service").unlink()
    assert scripts.found(root) == "none"


@pytest.mark.parametrize("manager", ["sysv", "openrc", "runit", "supervisor"])
def test_files_of_another_node_are_seen(manager: str, tmp_path: Path) -> None:
    assert not scripts.installed(manager, tmp_path)
    for path, (text, _) in scripts.filled(manager, Layout(ODD), tmp_path).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert scripts.installed(manager, tmp_path)
