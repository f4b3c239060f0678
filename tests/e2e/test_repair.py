"""A real node: damaged releases, an agent that nobody recorded, and a release that never answers."""

from __future__ import annotations

import json

from instar.host import processes
from instar.host.line import Line
from instar_lab import machine
from instar_lab.node import Node
from instar_lab.program import build
from tests.e2e.conftest import NEW, OLD, Hall, Stage, health, look, settings, settled, updates

SILENT = """\
import sys, time

def start(argv):
    if argv[:1] == ["agent"] and "--rehearse" not in argv:
        print("the words of one that never answers", file=sys.stderr, flush=True)
        time.sleep(600)
"""


def line_of(node: Node, role: str) -> Line:
    return Line(node.layout.line(role))


def damage(node: Node, role: str) -> str:
    """Fill the current release's program with zeros; its name."""
    line = line_of(node, role)
    path = line.program(name := line.current())
    size = path.stat().st_size
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(bytes(size))
    assert not line.is_valid(name)
    return name


def test_a_damaged_agent_and_a_damaged_updater_are_put_there_anew(stage: Stage) -> None:
    node = stage.node()
    stage.want(NEW)
    updates(node, NEW)
    for count, role in enumerate(("agent", "updater"), start=3):
        name = damage(node, role)
        look(node)
        found = settled(node, count)
        assert (found[-1]["line"], found[-1]["state"]) == (role, "confirmed"), node.logs(30)
        assert line_of(node, role).current() == name
        assert line_of(node, role).is_valid(name)
    stage.connected(node)
    assert health(node)["version"] == NEW
    assert json.loads(node.cli("status", "--json"))["lines"]["agent"]["digest"] == node.digests()["agent"]


def test_an_agent_whose_record_is_lost_is_replaced_all_the_same(stage: Stage) -> None:
    """D5: it is found by what it executes."""
    node = stage.node()
    old = node.pid("agent")
    assert old
    node.layout.process("agent").unlink()
    stage.want(NEW)
    updates(node, NEW)
    machine.wait_for(lambda: processes.start_time(old) is None, "the old one's end", 60.0, node.logs)
    assert [each.digest for each in node.running() if each.role == "agent"] == [node.digests()["agent"]]
    assert health(node)["version"] == NEW


def test_stop_ends_an_agent_that_nobody_recorded(stage: Stage) -> None:
    node = stage.node()
    node.layout.process("agent").unlink()
    node.cli("stop")
    machine.wait_for(lambda: not machine.naming(node.state), "nothing that runs", 60.0, node.logs)


def test_a_release_that_never_answers_is_put_back_with_what_both_said(stage: Stage, hall: Hall) -> None:
    """D6: within its tries, long before the lease is over."""
    silent = build.build("1.3.7", wrap=SILENT)
    hall.server.publish(silent)
    node = stage.node(settings(lease_s=60.0, cap_s=120.0, more="\n[probe]\ntries = 4\nevery_s = 2.5\n"))
    stage.want("1.3.7", ("agent",))
    look(node)
    (found,) = settled(node, 1)
    assert (found["state"], found["reason"]["code"]) == ("reverted", "probe-failed"), node.logs(30)
    candidate, restored = found["probes"]["candidate"], found["probes"]["restored"]
    assert (candidate["ok"], candidate["tries"]) == (False, 4)
    assert "the words of one that never answers" in candidate["output"]
    assert (restored["ok"], restored["said"]["version"]) == (True, OLD)
    stage.connected(node)
    assert health(node)["version"] == OLD
    last = found["changes"][-1]
    assert last["state"] == "reverted"
    assert "answers again" in last["reason"]
    assert "was put back, and answers" in node.cli("history")
