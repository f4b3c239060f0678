"""Modules that do their worst, through a whole node: each ends as a result, and the agent does not notice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from instar_lab import machine
from tests.e2e.conftest import Hall, Stage, health
from tests.e2e.orders import job, row, source

BODIES = {
    "segfault": ("import ctypes\n\ndef run(args, context):\n    ctypes.string_at(0)\n", "signal"),
    "abort": ("import os\n\ndef run(args, context):\n    os.abort()\n", "signal"),
    "hang": ("import time\n\ndef run(args, context):\n    time.sleep(1000)\n", "deadline"),
    "spin": ("def run(args, context):\n    while True:\n        pass\n", "deadline"),
    "raise": ("def run(args, context):\n    raise ValueError('no')\n", "module-failed"),
    "leave": ("import os\n\ndef run(args, context):\n    os._exit(0)\n", "failed"),
    "lines": ("def run(args, context):\n    while True:\n        context.log('x' * 1000)\n", "too-much-output"),
    "memory": ("def run(args, context):\n    held = []\n    while True:\n        held.append(bytearray(1 << 24))\n", "out-of-memory"),
    # As root, without a cgroup's limit, a real bomb would take this machine with it: tests/runner has one.
    "forks": (
        (
            "import os, time\n\ndef run(args, context):\n    for _ in range(200):\n        if os.fork() == 0:\n"
            "            time.sleep(1000)\n    time.sleep(1000)\n"
        ),
        "processes",
    ),
    "session": (
        ("import os, time\n\ndef run(args, context):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
        "            time.sleep(1000)\n        os._exit(0)\n    return {}\n"),
        "",
    ),
    "broken": ("import nothing_of_that_name\n\ndef run(args, context):\n    return {}\n", "not-loadable"),
    "none": ("x = 1\n", "no-symbol"),
    "reply": ("def run(args, context):\n    return {'x': float('nan')}\n", "bad-reply"),
    "closes": ("import os\n\ndef run(args, context):\n    os.closerange(0, 100)\n    return {}\n", "failed"),
}  # fmt: skip


@pytest.fixture(scope="session")
def gallery(hall: Hall) -> Iterator[Hall]:
    folder = hall.folder / "hostile"
    folder.mkdir()
    for name, (body, _) in BODIES.items():
        hall.server.publish_module(source(folder, f"hostile.{name}", body))
    return hall


def test_every_failure_ends_as_a_result_and_the_agent_goes_on(gallery: Hall, stage: Stage) -> None:
    node = stage.node()
    agent = node.pid("agent")
    wrong = []
    for name, (_, code) in BODIES.items():
        deadline_s = 3.0 if code == "deadline" else 60.0
        done = row(job(stage.server, f"hostile.{name}", node, deadline_s=deadline_s))
        said = {each: done[each] for each in ("state", "ok", "code", "text", "exit_code", "signal", "stderr")}
        if done["code"] != code or done["ok"] is not (code == ""):
            wrong.append((name, code, said))
    assert not wrong, "\n".join(map(str, wrong))
    assert node.pid("agent") == agent
    assert health(node)["connected"]
    machine.wait_for(
        lambda: not list(machine.naming(node.layout.modules)),
        "nothing left of them", 60.0, lambda: str(machine.naming(node.layout.modules)),
    )  # fmt: skip
