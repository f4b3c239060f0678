"""Signals: whatever is killed, stopped or started twice, one agent and one updater are left, or none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from instar.host import processes
from instar.host.clock import Clock
from instar_lab import machine
from instar_lab.node import Node
from tests.e2e.conftest import LINES, NEW, OLD, Stage, cli, log_has, look, settings, settled, updates


def keeper(node: Node) -> int:
    def alive() -> int | None:
        found = processes.recorded(node.layout.process("keep"))
        return found.pid if found and processes.alive(found, Clock().boot_id()) else None

    return machine.wait_for(alive, "a keeper", 60.0, node.logs)


def test_killed_daemons_come_back_and_a_stop_ends_all(stage: Stage) -> None:
    node = stage.node()
    first = node.pid("agent")
    assert first
    os.kill(first, signal.SIGKILL)
    machine.wait_for(lambda: (node.pid("agent") or first) != first, "another agent", 60.0, node.logs)
    stage.connected(node)
    updater = node.pid("updater")
    assert updater
    os.kill(updater, signal.SIGKILL)
    machine.wait_for(lambda: (node.pid("updater") or updater) != updater, "another updater", 60.0, node.logs)

    # A keeper that is killed leaves the daemons alone, and the next one adopts them.
    before = node.digests(), node.pid("agent")
    os.kill(keeper(node), signal.SIGKILL)
    time.sleep(0.3)
    assert (node.digests(), node.pid("agent")) == before
    node.cli("start")
    assert (node.digests(), node.pid("agent")) == before
    os.kill(keeper(node), signal.SIGTERM)
    machine.wait_for(lambda: not machine.naming(node.state), "nothing that runs", 60.0, node.logs)


def test_two_starts_at_once_give_one_of_each(stage: Stage) -> None:
    node = stage.node(start=False)
    line = [sys.executable, "-I", "-S", str(node.layout.launcher)]
    state = ("--state", str(node.state))
    starts = [
        subprocess.Popen([*line, "start", *state], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    extra = [subprocess.Popen([*line, "keep", *state], stderr=subprocess.PIPE) for _ in range(2)]
    ended = [start.communicate(timeout=180) for start in starts]
    assert [start.returncode for start in starts] == [0] * 4, ended
    stage.connected(node)
    assert sorted(node.digests()) == sorted(LINES)  # it raises when a role is played twice

    def alone() -> list[machine.Seen] | None:
        found = [seen for seen in machine.naming(node.state) if "keep" in seen.words]
        return found if len(found) == 1 else None

    keepers = machine.wait_for(alone, "one keeper", 60.0)
    pids = {role: node.pid(role) for role in LINES}
    for role in LINES:  # a third one, by hand
        done = cli(node, "launch", role)
        assert done.returncode == 4
        assert "another process" in done.stderr
    assert {role: node.pid(role) for role in LINES} == pids
    for process in extra:
        if process.pid != keepers[0].pid:
            process.communicate(timeout=60)
            assert process.returncode == 4
    node.cli("stop")
    for process in extra:
        process.communicate(timeout=60)


def test_a_hung_agent_is_replaced_by_the_update(stage: Stage) -> None:
    node = stage.node()
    agent = node.pid("agent")
    assert agent
    stage.want(NEW, ("updater",))
    updates(node, NEW, ("updater",))
    os.kill(agent, signal.SIGSTOP)
    stage.want(NEW, ("agent",))
    updates(node, NEW, ("agent",), before=1)
    machine.wait_for(lambda: not machine.command_line(agent), "the hung agent's end", 60.0)
    assert node.digests()["agent"] == stage.hall.programs[NEW].digest


def test_a_hung_updater_on_trial_is_undone_by_the_agents_guard(stage: Stage) -> None:
    """The keeper is stopped too, so that only the agent can find it out."""
    node = stage.node(settings(hold_s=8.0, lease_s=10.0, cap_s=12.0))
    stage.want(NEW, ("updater",))
    look(node)
    log_has(node, "updater", f"updater {NEW}")
    updater = node.pid("updater")
    assert updater
    os.kill(updater, signal.SIGSTOP)
    kept = keeper(node)
    os.kill(kept, signal.SIGSTOP)
    try:
        log_has(node, "agent", "put the previous updater back", 90.0)
        machine.wait_for(lambda: node.pid("updater") != updater, "the hung updater's end", 60.0, node.logs)
    finally:
        os.kill(kept, signal.SIGCONT)
    (entry,) = settled(node, 1)
    assert (entry["line"], entry["state"]) == ("updater", "reverted")
    assert entry["reason"]["code"] == "lease-lapsed"
    assert node.digests() == dict.fromkeys(LINES, stage.hall.programs[OLD].digest)
    stage.connected(node)
