"""Modules and jobs from the operator's order to a real node and back (R3, R4, R5)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from instar.core.errors import InstarError
from instar_lab import machine
from tests.e2e import orders
from tests.e2e.conftest import Hall, Stage, cli, health, look, settled
from tests.e2e.orders import MODULES, ended, job, modules, row, runs, shown, variant, want_module


@pytest.fixture(scope="session")
def shelf(hall: Hall) -> Iterator[Hall]:
    """The server, with the tests' modules published."""
    hall.server.publish_module(MODULES / "lab.mark")
    hall.server.publish_module(MODULES / "lab.memory")
    made = hall.folder / "variants"
    made.mkdir()
    changed = {'VERSION = "one"': 'VERSION = "two"'}
    hall.server.publish_module(variant(made, "lab.memory", "1.1.0", changed))
    falls = {"def request(": "def step(context):\n    raise SystemExit(3)\n\n\ndef request("}
    hall.server.publish_module(variant(made, "lab.memory", "1.2.0", falls))
    never = {"def start(context):": "def start(context):\n    raise ValueError('not today')"}
    hall.server.publish_module(variant(made, "lab.memory", "1.3.0", never))
    return hall


def marks(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def test_a_module_that_no_node_had_runs_at_once_and_is_kept(shelf: Hall, stage: Stage) -> None:
    node = stage.node()
    folder = node.layout.modules / "lab.mark" / "releases"
    assert not folder.exists()
    file = stage.folder / "marks"
    args = {"file": str(file), "n": 1, "lines": 3}
    done = row(job(stage.server, "lab.mark", node, args=args))
    assert (done["state"], done["ok"], done["reply"]) == ("done", True, {"n": 1}), done
    assert "line 2" in done["output"]
    assert done["max_rss"] > 0
    assert marks(file) == ["1"]
    (kept,) = folder.iterdir()
    stamp = (kept / "valid").stat().st_mtime_ns
    assert row(job(stage.server, "lab.mark", node, args=args | {"n": 2}))["ok"] is True
    assert [each.name for each in folder.iterdir()] == [kept.name]
    assert (kept / "valid").stat().st_mtime_ns == stamp, "it was fetched again"

    # Whatever lies on the disk is checked before it runs; what was altered is fetched anew.
    os.chmod(kept / "mark.py", 0o644)
    (kept / "mark.py").write_text("def run(args, context):\n    return {'n': 'altered'}\n")
    assert row(job(stage.server, "lab.mark", node, args=args | {"n": 3}))["reply"] == {"n": 3}


def test_a_node_that_was_off_gets_its_jobs_unless_they_lapsed(shelf: Hall, stage: Stage) -> None:
    node = stage.node()
    file = stage.folder / "marks"
    assert row(job(stage.server, "lab.mark", node, args={"file": str(file), "n": 0}))["ok"]
    node.cli("stop")
    kept = [
        job(stage.server, "lab.mark", node, 0.0, args={"file": str(file), "n": n}, lapse_s=600.0)["id"]
        for n in range(1, 6)
    ]
    lapsing = job(stage.server, "lab.mark", node, 0.0, args={"file": str(file), "n": 99}, lapse_s=1.0)["id"]
    cancelled = job(stage.server, "lab.mark", node, 0.0, args={"file": str(file), "n": 98})["id"]
    assert row(stage.server.api.post(f"/jobs/{cancelled}/cancel", {}))["state"] == "cancelled"
    time.sleep(1.5)
    node.cli("start")
    assert [ended(stage.server, order)["state"] for order in kept] == ["done"] * 5
    assert ended(stage.server, lapsing)["state"] == "lapsed"
    assert sorted(marks(file)) == ["0", "1", "2", "3", "4", "5"]


def test_a_running_job_is_cancelled_and_a_slow_one_ends_at_its_deadline(shelf: Hall, stage: Stage) -> None:
    node = stage.node()
    file = stage.folder / "marks"
    args = {"file": str(file), "n": 1, "seconds": 60}
    order = job(stage.server, "lab.mark", node, 0.0, args=args)["id"]
    machine.wait_for(lambda: marks(file), "a job that runs", 60.0, node.logs)
    stage.server.api.post(f"/jobs/{order}/cancel", {})
    end = ended(stage.server, order)
    assert (end["state"], end["code"]) == ("cancelled", "cancelled"), end
    slow = ended(stage.server, job(stage.server, "lab.mark", node, args=args, deadline_s=6.0)["id"])
    assert (slow["state"], slow["code"]) == ("failed", "deadline"), slow
    assert marks(file) == ["1", "1"]


def test_jobs_that_no_node_could_run_are_refused_before_anything_is_sent(shelf: Hall, stage: Stage) -> None:
    node = stage.node()
    for body, code in (
        ({"module": "lab.nothing", "select": {"nodes": [node.id]}}, "unknown-module"),
        ({"module": "lab.mark", "version": "9.9.9", "select": {"nodes": [node.id]}}, "unknown-module"),
        ({"module": "lab.mark", "select": {"nodes": ["n-0000000000000000"]}}, "unknown-node"),
        ({"module": "lab.mark", "select": {"group": "no-such-group"}}, "unknown-group"),
    ):
        with pytest.raises(InstarError) as raised:
            stage.server.api.post("/jobs", body)
        assert raised.value.code == code, raised.value


def test_a_service_module_comes_by_transaction_and_keeps_its_state(shelf: Hall, stage: Stage) -> None:
    node = stage.node()
    want_module(stage.server, stage.group, "lab.memory", "1.0.0")
    first = runs(node, "lab.memory", "1.0.0")
    assert row(job(stage.server, "lab.memory", node, args={"add": 5}))["reply"]["sum"] == 5

    # Killed, it comes back with what it knew.
    os.kill(first["pid"], signal.SIGKILL)
    machine.wait_for(
        lambda: modules(node).get("lab.memory", {}).get("pid") not in (0, None, first["pid"]), "another", 60.0
    )
    runs(node, "lab.memory", "1.0.0")
    assert row(job(stage.server, "lab.memory", node, args={"add": 2}))["reply"]["sum"] == 7

    # A newer one replaces it, on trial first; the state goes on.
    want_module(stage.server, stage.group, "lab.memory", "1.1.0")
    runs(node, "lab.memory", "1.1.0")
    reply = row(job(stage.server, "lab.memory", node))["reply"]
    assert (reply["sum"], reply["version"]) == (7, "two")
    found = settled(node, 2)
    assert [(e["line"], e["version"], e["state"]) for e in found] == [
        ("module/lab.memory", "1.0.0", "confirmed"),
        ("module/lab.memory", "1.1.0", "confirmed"),
    ]

    # No longer wanted: it is stopped and gone.
    line = "module/lab.memory"
    stage.server.api.delete("/wishes", scope="group", subject=stage.group, line=[line])
    look(node)
    machine.wait_for(lambda: "lab.memory" not in modules(node), "no module", 60.0, node.logs)
    left = node.layout.modules / "lab.memory"
    machine.wait_for(lambda: not machine.naming(left), "no process of it", 60.0, node.logs)


def test_a_bad_service_module_is_reverted_and_the_old_one_goes_on(shelf: Hall, stage: Stage) -> None:
    """1.2.0 falls once it runs, 1.3.0 does not even start: the rehearsal finds it."""
    node = stage.node()
    want_module(stage.server, stage.group, "lab.memory", "1.0.0")
    runs(node, "lab.memory", "1.0.0")
    row(job(stage.server, "lab.memory", node, args={"add": 3}))
    agent = node.pid("agent")
    for number, version in enumerate(("1.2.0", "1.3.0"), start=2):
        want_module(stage.server, stage.group, "lab.memory", version)
        look(node)
        last = settled(node, number)[-1]
        assert (last["version"], last["state"]) == (version, "reverted"), last
        runs(node, "lab.memory", "1.0.0")
        assert row(job(stage.server, "lab.memory", node))["reply"]["sum"] == 3
    assert node.pid("agent") == agent, "the agent must not notice"


def test_restart_commands_from_the_server_and_on_the_node(shelf: Hall, stage: Stage) -> None:
    node = stage.node()
    want_module(stage.server, stage.group, "lab.memory", "1.0.0")
    before = runs(node, "lab.memory", "1.0.0")
    agent = node.pid("agent")
    done = orders.restart(stage.server, node, modules=["lab.memory"])
    assert (done["state"], done["ok"]) == ("done", True), done
    after = runs(node, "lab.memory", "1.0.0")
    assert after["pid"] != before["pid"]
    assert node.pid("agent") == agent

    done = orders.restart(stage.server, node, agent=True)
    assert (done["state"], done["ok"]) == ("done", True), done
    assert node.pid("agent") not in (None, agent)
    assert health(node)["connected"]
    again = runs(node, "lab.memory", "1.0.0")
    assert again["pid"] != after["pid"]

    by_hand = cli(node, "restart", "--module", "lab.memory", "--within", "120", "--wait", "150", "--json")
    assert by_hand.returncode == 0, by_hand.stdout + by_hand.stderr
    by_hand = cli(node, "restart", "--within", "120", "--wait", "150", "--json")
    assert by_hand.returncode == 0, by_hand.stdout + by_hand.stderr
    runs(node, "lab.memory", "1.0.0")
    assert row(job(stage.server, "lab.memory", node))["reply"]["starts"] == 5
    wrong = cli(node, "restart", "--module", "lab.nothing")
    assert wrong.returncode != 0
    assert "lab.nothing" in wrong.stderr
    log = (node.layout.run / "agent.log").read_text()
    assert f"local:{os.getuid()}" in log
    assert "server:" in log


def test_an_order_is_listed_and_shown(shelf: Hall, stage: Stage) -> None:
    node = stage.node()
    order = job(stage.server, "lab.mark", node, args={"file": str(stage.folder / "m"), "n": 1})
    assert order["id"] in [each["id"] for each in stage.server.api.get("/jobs")["orders"]]
    assert row(shown(stage.server, order["id"]))["state"] == "done"
