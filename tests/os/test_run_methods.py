"""How the agent is kept running where systemd is not, with the real managers from Debian's packages (W5, M4).

Each: install, start, tell how it was started, restart with proof that the old process is gone, stop, start,
a killed agent, and an uninstall that leaves nothing. In a state folder that every script must quote.
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from instar.host.layout import Layout
from instar_lab import machine
from instar_lab.container import Container
from tests.os.conftest import OLD, Hall
from tests.os.node import AGENT, LINES, PROGRAM, STATE, OsNode, plays

# The sysv test is the short run for CI; `make test-os` runs all.
pytestmark = pytest.mark.xdist_group("containers")

ODD_STATE = "/var/lib/a node's $HOME 100%"
GAP_S = 60.0  # bounds only: the figure is printed
DO = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from instar.host.clock import Clock
from instar.host.layout import Layout
from instar.host.services import running
from instar.host.services.detect import detect
layout, clock = Layout(Path(sys.argv[2])), Clock()
if sys.argv[3] == "detect":
    print(detect(layout, clock))
else:
    running(layout, clock).restart(sys.argv[4])
"""


@dataclass(frozen=True)
class Method:
    """`first` is what runs in the container instead of systemd."""

    name: str
    first: tuple[str, ...]
    option: str = "auto"
    up: str = ""  # there when the manager is
    state: str = ODD_STATE


SYSV = Method("sysv", ("sleep", "infinity"), option="sysv")
METHODS = [
    Method(
        "openrc",
        ("sh", "-c", "openrc sysinit; openrc default; exec sleep infinity"),
        up="/run/openrc/softlevel",
    ),
    Method("runit", ("runsvdir", "-P", "/etc/service")),
    Method(
        "supervisor",
        ("supervisord", "-n", "-c", "/etc/supervisor/supervisord.conf"),
        up="/run/supervisor.sock",
        state="/var/lib/a node's $HOME",
    ),
]


class PlainNode(OsNode):
    """A node in a container without systemd."""

    state = STATE

    def cli(self, *words: str) -> str:
        return self.container.do(
            "python3", f"{self.state}/launcher/instar.pyz", *words, "--state", self.state
        )

    def do(self, *words: str) -> str:
        """Call the services' code of the installed program, in a process of its own."""
        line = ["python3", "-I", "-S", "-c", DO, f"{self.state}/launcher/instar.pyz", self.state, *words]
        return self.container.do(*line).strip()

    def process(self, role: str) -> machine.Seen:
        """The one process that plays the role, with its pid outside."""
        (found,) = [seen for seen in self.container.processes() if plays(seen, role)]
        return found

    def words(self) -> str:
        logs = [
            path
            for path in sorted(self.layout.run.glob("**/*"))
            if path.name.endswith("log") or path.name == "current"
        ]
        said = [f"--- {path.name}\n{machine.tail(path)}" for path in logs if path.is_file()]
        return "\n".join([*said, f"--- console\n{machine.tail(self.container.console)}"])


Make = Callable[[Method, Path], PlainNode]


@pytest.fixture
def make(hall: Hall) -> Iterator[Make]:
    """Boots a container for a method; the node in it is not installed yet."""
    open_ones: list[Container] = []
    folder = Path(tempfile.mkdtemp(prefix="ios-"))

    def made(method: Method, tree: Path) -> PlainNode:
        container = Container(tree, folder / "box", method.first)
        container.__enter__()
        open_ones.append(container)
        if method.up:
            machine.wait_for(
                lambda: container.run("test", "-e", method.up).returncode == 0, method.up, 60.0,
                lambda: machine.tail(container.console),
            )  # fmt: skip
        group = f"g-{uuid.uuid4().hex[:12]}"
        hall.server.api.post("/groups", {"name": group})
        node = PlainNode(container, hall.server, hall.programs, group)
        node.state = method.state
        node.layout = Layout(container.root / method.state.lstrip("/"))
        return node

    try:
        yield made
    finally:
        for container in open_ones:
            container.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_sysv(make: Make, tree: Path) -> None:
    run_through(make(SYSV, tree), SYSV)


@pytest.mark.os
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_other_managers(make: Make, other_tree: Path, method: Method) -> None:
    run_through(make(method, other_tree), method)


def run_through(node: PlainNode, method: Method) -> None:
    files = ours(node)
    printed = node.install(OLD, "--state", node.state, "--service", method.option)
    assert f"kept running by {method.name}" in printed
    node.connected()
    both_run(node)
    assert node.do("detect") == method.name

    restarted(node, lambda: node.do("restart", "agent"))
    restarted(node, lambda: ordered(node))
    assert node.do("detect") == method.name
    killed(node)

    before = node.connected_since()
    node.cli("stop")
    assert node.residents() == []
    time.sleep(1.2)  # longer than any of them waits before it starts one again
    assert node.residents() == []
    node.cli("start")
    node.connected(after=before)
    assert node.do("detect") == method.name

    node.container.do("python3", PROGRAM, "uninstall", "--state", node.state)
    assert node.residents() == []
    assert not any("instar" in " ".join(seen.words) for seen in node.container.processes())
    assert ours(node) == files
    assert not node.layout.state.exists()


def both_run(node: PlainNode) -> None:
    machine.wait_for(lambda: node.residents() == sorted(LINES), "an agent and an updater", 60.0, node.words)


def restarted(node: PlainNode, restart: Callable[[], object]) -> None:
    """The old process is gone for certain, a new one is on its channel, and the updater goes on."""
    old, updater, before = node.process("agent"), node.process("updater"), node.connected_since()
    began = time.time()
    restart()
    assert machine.command_line(old.pid) != old.words
    since = node.connected(after=before)
    print(f"restart of the agent: {since - began:.2f} s from the order to the new channel")
    assert node.process("agent").pid != old.pid
    assert node.process("updater") == updater
    assert since - began < GAP_S


def ordered(node: OsNode) -> None:
    """`instar restart` waits for the end of the command, which the new agent tells."""
    said = json.loads(node.cli("restart", "--json"))
    assert (said["status"], said["type"]) == ("success", "restart-agent"), said


def killed(node: PlainNode) -> None:
    old, before = node.process("agent"), node.connected_since()
    machine.signal_process(old, 9)  # type: ignore[arg-type]
    node.connected(after=before)
    assert node.process("agent").pid != old.pid


def ours(node: PlainNode) -> list[str]:
    """Every file of the container with our name in it, or in which a script could have it."""
    found = node.container.do(
        "sh",
        "-c",
        "find / -xdev -name '*instar*' ! -path '/proc/*' ! -path '/sys/*'; grep -rl instar /etc || true",
    )
    return sorted(path for path in found.splitlines() if path != PROGRAM and not path.startswith("/var/log/"))


# --- systemd


@pytest.mark.os
def test_agent_under_systemd_is_restarted_by_its_own_child(node: OsNode) -> None:
    """The child is in the agent's cgroup, and ended with it: the order must have been handed in by then."""
    node.set_up(OLD)
    place, launcher = node.layout.state, f"{STATE}/launcher/instar.pyz"
    pid, before = node.pid(AGENT), node.connected_since()
    assert place.exists()
    script = shlex.join(["exec", "python3", "-I", "-S", "-c", DO, launcher, STATE])
    detected = node.container.do("sh", "-c", f"{script} detect").strip()
    assert detected == "systemd"
    group = next(
        line.split(":", 2)[2]
        for line in node.container.do("cat", f"/proc/{pid}/cgroup").splitlines()
        if "instar-agent.service" in line
    )
    join = f'for d in /sys/fs/cgroup /sys/fs/cgroup/systemd /sys/fs/cgroup/unified; do echo $$ > "$d{group}/cgroup.procs"; done'
    inside = f"({join}) 2>/dev/null; grep -q instar-agent.service /proc/self/cgroup || exit 9; {script} restart agent"
    began = time.time()
    status = node.container.run("sh", "-c", inside).returncode
    assert status != 9
    since = node.connected(after=before)
    print(f"systemd, from within: status {status}, {since - began:.2f} s from the order to the new channel")
    assert node.pid(AGENT) not in (0, pid)
    assert node.container.property(AGENT, "NRestarts") == "0"  # by order, not by accident
    entries = [line.text for line in node.container.journal(AGENT)]
    assert sum(text.startswith("Stopping") for text in entries) == 1

    pid, before = node.pid(AGENT), since
    began = time.time()
    ordered(node)
    since = node.connected(after=before)
    print(f"systemd, `instar restart`: {since - began:.2f} s from the order to the new channel")
    assert node.pid(AGENT) not in (0, pid)
    assert node.container.property(AGENT, "NRestarts") == "0"
    assert node.container.run("systemctl", "--failed", "--no-legend").stdout == ""


@pytest.mark.os
def test_agent_started_by_hand_beside_its_unit_is_told_apart(node: OsNode) -> None:
    node.install(OLD, "--no-start")
    launcher = f"{STATE}/launcher/instar.pyz"
    by_hand = (
        f"cd /; setsid python3 {launcher} agent --state {STATE} --log json </dev/null >/root/agent.log 2>&1 &"
    )
    node.container.do("sh", "-c", by_hand)
    before = node.connected()
    line = ["python3", "-I", "-S", "-c", DO, launcher, STATE]
    assert node.container.do(*line, "detect").strip() == "bare"
    (old,) = [seen for seen in node.container.processes() if plays(seen, "agent")]
    ordered(node)
    node.connected(after=before)
    (new,) = [seen for seen in node.container.processes() if plays(seen, "agent")]
    assert new.pid != old.pid
    assert new.words[-2:] == ("--log", "json")
    assert node.container.do(*line, "detect").strip() == "bare"
    assert all(json.loads(text) for text in (node.container.root / "root/agent.log").read_text().splitlines())
    node.container.do("systemctl", "restart", AGENT)  # the unit waits for its role
    assert node.residents().count("agent") == 1
