"""A node under real systemd, from its installation to its removal."""

from __future__ import annotations

import json

import pytest

from instar_lab import machine
from instar_lab.container import Container
from tests.os.conftest import CRASHES, KILLED, NEW, OLD
from tests.os.node import AGENT, LINES, PLAN, PROGRAM, SOCKET, STATE, TIMER, UNITS, UPDATER, OsNode, outcomes

# The first two tests are the short run for CI; `make test-os` runs all.
pytestmark = pytest.mark.xdist_group("containers")

IDLE_WITHIN_S = 60.0
MOST_EXPOSED = {AGENT: 5.0, UPDATER: 3.0}  # 0 to 10, by `systemd-analyze security`


def idle(node: OsNode) -> None:
    """Wait until the updater has left by itself."""
    machine.wait_for(
        lambda: node.active(UPDATER) == "inactive", "an updater that has left", IDLE_WITHIN_S, node.words
    )


def test_installed_node_runs_and_its_updater_leaves_when_idle(node: OsNode) -> None:
    printed = node.install(OLD)
    assert "kept running by systemd" in printed
    for unit in UNITS:
        assert node.container.property(unit, "UnitFileState") == "enabled"
        assert node.active(unit) == "active"
    node.connected()
    status = node.status()
    assert status["node"] == node.id
    assert all(line["answers"] for line in status["lines"].values()), status
    assert node.container.run("systemctl", "--failed", "--no-legend").stdout == ""

    idle(node)
    assert node.container.property(UPDATER, "Result") == "success"
    assert node.residents() == ["agent"]
    assert (node.active(SOCKET), node.active(TIMER)) == ("active", "active")
    assert node.status()["lines"]["updater"]["answers"]  # its socket has started it
    for unit, most in MOST_EXPOSED.items():
        exposed = exposure(node.container, unit)
        print(f"systemd-analyze security: {unit} {exposed}")
        assert exposed <= most, unit


def exposure(container: Container, unit: str) -> float:
    text = container.do("systemd-analyze", "security", "--no-pager", unit).splitlines()[-1]
    return float(text.partition(":")[2].split()[0])  # "→ Overall exposure level for …: 3.4 OK"


def test_both_lines_are_updated_by_an_updater_that_survives_the_agents_restart(node: OsNode) -> None:
    node.set_up(OLD)
    idle(node)
    before = node.connected_since()
    restarts = int(node.container.property(AGENT, "NRestarts"))

    socket = node.layout.socket("updater").stat().st_ino

    node.want(NEW)  # nothing else: the server's word wakes the agent, the agent wakes the updater
    assert outcomes(node.settled(2)) == [(line, NEW, "confirmed") for line in LINES]

    since = node.connected(after=before)
    assert node.versions() == {"agent": NEW, "updater": NEW}
    stopping = [line.wall for line in node.container.journal(AGENT) if line.text.startswith("Stopping")]
    assert len(stopping) == 1
    print(f"update gap of the agent: {since - stopping[0]:.3f} s from the stop to the new channel")
    assert since > stopping[0]
    # The agent was restarted by order, never by accident, and the updater went on as one process through it:
    assert int(node.container.property(AGENT, "NRestarts")) == restarts
    started = [line for line in node.container.journal(UPDATER) if line.text.startswith("Started")]
    assert started[-1].wall < stopping[0]
    # The hand-over kept the socket that systemd listens on, and nothing needs it to be made again:
    assert node.layout.socket("updater").stat().st_ino == socket
    idle(node)
    assert node.container.property(UPDATER, "Result") == "success"
    reported = {(each["line"], each["phase"]) for each in node.server.history(node.id)}
    assert reported >= {(line, "confirmed") for line in LINES}  # before it left


@pytest.mark.os
@pytest.mark.parametrize("line", LINES)
def test_release_that_crashes_is_reverted_without_help(node: OsNode, line: str) -> None:
    node.set_up(OLD, hold_s=3.0)  # it lives for a second at a time
    node.want(CRASHES, line)
    (entry,) = node.settled(1)
    assert outcomes([entry]) == [(line, CRASHES, "reverted")]
    assert entry["reason"]["code"] == "attempts-used-up", entry
    assert "3 times" in entry["reason"]["text"]
    node.connected()
    status = node.status()
    assert {role: each["current"].partition("-")[0] for role, each in status["lines"].items()} == {
        "agent": OLD,
        "updater": OLD,
    }
    assert all(each["answers"] for each in status["lines"].values())
    assert node.container.run("systemctl", "--failed", "--no-legend").stdout == ""
    node.want(NEW)  # nothing is blocked: neither a start limit nor the quarantine of another release
    assert outcomes(node.settled(3))[1:] == [(each, NEW, "confirmed") for each in LINES]


@pytest.mark.os
@pytest.mark.parametrize("line", LINES)
def test_power_cut_in_the_middle_of_a_trial(node: OsNode, line: str) -> None:
    node.set_up(OLD, hold_s=4.0)
    node.want(NEW, line)
    switch = node.layout.line(line)
    machine.wait_for(
        lambda: switch.trial.exists() and switch.current.readlink().name.startswith(NEW),
        "a release on trial", 60.0, node.words, every_s=0.02,
    )  # fmt: skip
    before = node.connected_since()
    node.container.cut_power()
    node.container.boot()

    entries = node.settled(1)
    entry = entries[-1]
    node.connected(after=before)
    assert entry["state"] in ("confirmed", "reverted"), entry
    runs = NEW if entry["state"] == "confirmed" else OLD
    status = node.status()["lines"][line]
    assert status["current"].startswith(runs)
    assert status["running"] == status["current"]
    roles = node.residents()
    assert "agent" in roles
    assert len(roles) == len(set(roles)), roles
    assert status["trial"] == ""
    if line == "agent":
        assert node.versions()["agent"] == runs
    ends = [(each["state"], each["reason"]) for each in entries]
    print(f"power cut in a trial of the {line}: {ends}")


@pytest.mark.os
def test_updater_killed_while_it_stages_is_started_again_and_finishes(node: OsNode) -> None:
    node.set_up(KILLED, plan={"kills": [{"role": "updater", "point": "stage:fetch"}]})
    node.want(NEW)
    assert outcomes(node.settled(2)) == [(line, NEW, "confirmed") for line in LINES]
    assert (node.layout.state / f"{PLAN}.done").stat().st_size == 1
    died = [line.text for line in node.container.journal(UPDATER) if "status=9/KILL" in line.text]
    assert len(died) == 1


@pytest.mark.os
def test_uninstall_leaves_nothing(node: OsNode) -> None:
    node.set_up(OLD)
    node.cli("uninstall")
    assert not node.layout.state.exists()
    assert node.residents() == []
    assert not any(STATE in " ".join(seen.words) for seen in node.container.processes())
    listed = node.container.do("systemctl", "list-units", "--all", "--plain", "--no-legend", "instar-*")
    assert listed == ""
    files = node.container.do("find", "/etc/systemd", "/run/systemd", "/var/lib/systemd", "-name", "*instar*")
    assert files == ""
    for unit in UNITS:
        assert node.container.property(unit, "LoadState") == "not-found"
    assert node.container.run("systemctl", "start", AGENT).returncode != 0


@pytest.mark.os
def test_state_folder_that_unit_files_need_quoted(node: OsNode) -> None:
    """Also one below /tmp, which the units would not see with a /tmp of their own."""
    state = "/tmp/a node's $HOME 100%"
    node.install(OLD, "--state", state)
    listens = node.container.property(SOCKET, "Listen")
    assert listens.replace("\\'", "'") == f"{state}/run/updater.sock (Stream)"

    def answer() -> bool:
        said = node.container.do("python3", PROGRAM, "status", "--json", "--state", state)
        return all(line["answers"] for line in json.loads(said)["lines"].values())

    machine.wait_for(
        answer, "both that answer", 20.0, node.words
    )  # `install` waits for processes, not for words
    node.container.do("python3", PROGRAM, "uninstall", "--state", state)
    assert not any(state in " ".join(seen.words) for seen in node.container.processes())
