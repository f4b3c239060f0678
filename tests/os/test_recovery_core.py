"""Under real systemd: a recovery core runs in a unit of its own, outside the agent's reach and its bounds.

What starts it is a stand-in for the agent, by the very unit that `instar install` wrote.
"""

from __future__ import annotations

import json

import pytest

from instar_lab import machine
from tests.os.conftest import OLD
from tests.os.node import AGENT, OsNode

pytestmark = pytest.mark.xdist_group("containers")

UNIT = "instar-recovery.service"
CORE = """
import json, os, sys, time
state = sys.argv[sys.argv.index("--state") + 1]
with open(os.path.join(state, "core.new"), "w") as file:
    said = {"pid": os.getpid(), "cgroup": open("/proc/self/cgroup").read(), "caps": open("/proc/self/status").read()}
    json.dump(said, file)
os.rename(os.path.join(state, "core.new"), os.path.join(state, "core.said"))
print(json.dumps({"progress": {"phase": "waits", "percent": 5}}), flush=True)
while os.path.exists("/root/wait"): time.sleep(0.05)
open(os.path.join(state, "core.done"), "w").write("done")
print(json.dumps({"ended": {"ok": True}}), flush=True)
"""
AGENT_SCRIPT = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, "/root/instar.pyz")
from instar.core.errors import MachineError
from instar.host import rescue
from instar.host.clock import Clock
from instar.host.layout import Layout
layout = Layout(Path("/var/lib/instar"))
log = open("/var/lib/instar/said", "a", buffering=1)
try:
    core = rescue.start(layout, Path("/root/core.py"), Path("/root/order.json"), Clock())
except MachineError as error:
    print(error.code, file=log)
    time.sleep(3600)
print(os.read(core.stdout, 65536).decode().strip(), file=log)
if os.path.exists("/root/kill"):
    core.kill()
while core.poll() is None: time.sleep(0.05)
print("status", core.poll(), file=log)
time.sleep(3600)
"""
DROP_IN = """
[Service]
ExecStart=
ExecStart=/usr/bin/python3 -I -S /root/agent.py
"""


@pytest.fixture
def stand_in(node: OsNode) -> OsNode:
    """A node whose agent's unit runs the script above."""
    node.install(OLD, "--no-start")
    root = node.container.root
    (root / "root/core.py").write_text(CORE)
    (root / "root/agent.py").write_text(AGENT_SCRIPT)
    (root / "root/wait").touch()
    folder = root / "etc/systemd/system" / f"{AGENT}.d"
    folder.mkdir()
    (folder / "test.conf").write_text(DROP_IN)
    node.container.do("systemctl", "daemon-reload")
    return node


def said(node: OsNode, words: str) -> None:
    path = node.layout.state / "said"
    machine.wait_for(lambda: path.exists() and words in path.read_text(), f"'{words}'", 60.0, node.words)


def test_the_core_outlives_the_agents_unit(stand_in: OsNode) -> None:
    node = stand_in
    node.container.do("systemctl", "start", AGENT)
    said(node, '"phase": "waits"')
    core = json.loads((node.layout.state / "core.said").read_text())
    assert UNIT in core["cgroup"]
    assert AGENT not in core["cgroup"]
    assert "NoNewPrivs:\t0" in core["caps"]
    node.container.do("systemctl", "restart", AGENT)
    said(node, "recovery-running")
    done = node.layout.state / "core.done"
    assert not done.exists()
    assert node.active(UNIT) == "active"
    (node.container.root / "root/wait").unlink()
    machine.wait_for(done.exists, "the core's end", 60.0, node.words)
    machine.wait_for(lambda: node.active(UNIT) == "inactive", "the unit's end", 60.0, node.words)
    node.container.do("systemctl", "restart", AGENT)
    said(node, "status 0")


def test_the_core_and_its_unit_are_killed_together(stand_in: OsNode) -> None:
    node = stand_in
    (node.container.root / "root/kill").touch()
    node.container.do("systemctl", "start", AGENT)
    said(node, "status ")
    assert "status 0" not in (node.layout.state / "said").read_text()
    machine.wait_for(lambda: node.active(UNIT) in ("inactive", "failed"), "the unit's end", 60.0, node.words)
    assert not (node.layout.state / "core.done").exists()
