"""The demo from end to end, as `make demo` runs it; and what an interrupted one leaves behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from instar_lab import machine
from instar_lab.demo.checks import WrongEnd, check_done, check_other_processes, check_same_state
from instar_lab.demo.script import ACTS, STEPS
from instar_lab.demo.work import confirmed

COMMAND = [sys.executable, "-m", "instar_lab.main", "demo"]


@pytest.fixture
def keep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is not there yet, with a path short enough for sockets."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="instar-demo-", dir="/tmp") as name:
        yield Path(name) / "d"


def test_every_node_ends_on_the_good_release(keep: Path, tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    words = ["--nodes", "2", "--keep", str(keep), "--report", str(report_file)]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = json.loads(report_file.read_text())
    assert report["ok"] is True
    names = [(s.name, s.version) for s in STEPS] + [(a.name, a.wanted) for a in ACTS]
    assert [(step["name"], step["wanted"]) for step in report["steps"]] == names
    outcomes = [step["outcome"] for step in report["steps"]]
    assert outcomes[:7] == ["installed", "updated", "refused", "refused", "refused", "reverted", "refused"]
    assert outcomes[7:] == ["answered", "installed", "restarted", "restarted"]
    assert all(step["reason"] and "\n" not in step["reason"] for step in report["steps"])
    digests = [set(step["nodes"].values()) for step in report["steps"]]
    assert all(len(each) == 1 for each in digests), "all nodes run the same"
    assert digests[0] != digests[1]
    assert digests[1:] == [digests[1]] * 10, "no bad release ever stays"
    assert machine.naming(keep) == []
    assert (keep / "n1" / "journal").is_dir(), "--keep leaves the folder in place"


def test_an_interrupt_leaves_no_process(keep: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--nodes", "1", "--keep", str(keep)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "[2/" in line:
            break
    assert machine.naming(keep)
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait(180) == 130
    assert machine.naming(keep) == []


def order(*states: str) -> dict[str, Any]:
    rows = [{"node": f"n-{n}", "state": state, "code": "", "text": ""} for n, state in enumerate(states)]
    return {"name": "m", "rows": rows}


def told(*changes: list[int]) -> dict[str, Any]:
    return {"rows": [{"node": f"n-{n}", "reply": {"changes": each}} for n, each in enumerate(changes)]}


def test_its_checks_of_work_hold_what_is_right_and_nothing_else() -> None:
    check_done(order("done", "done"), 2)
    check_same_state(told([1], [1, 2]), told([1, 2], [1, 2, 3]))
    check_other_processes({"n-1": 7, "n-2": 8}, {"n-1": 9, "n-2": 10}, "m")
    for wrong in (
        lambda: check_done(order("done", "failed"), 2),
        lambda: check_done(order("done"), 2),
        lambda: check_done(order(), 2),
        lambda: check_same_state(told([1], [1]), told([1], [2])),
        lambda: check_same_state(told([1, 2]), told([1])),
        lambda: check_same_state(told([]), told([1])),
        lambda: check_other_processes({"n-1": 7, "n-2": 8}, {"n-1": 9, "n-2": 8}, "m"),
        lambda: check_other_processes({"n-1": 7}, {"n-1": None}, "m"),
    ):
        with pytest.raises(WrongEnd):
            wrong()
    here = {"line": "module/m", "phase": "confirmed"}
    assert confirmed([here, {"line": "agent", "phase": "trial"}], "module/m")
    assert not confirmed([here, {"line": "module/m", "phase": "trial"}], "module/m")
    assert not confirmed([], "module/m")
