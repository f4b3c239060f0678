"""The rehearsal of a service module by the program's real runner, cold, with its limits and on a copy of its data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instar.core.journal import Progress
from instar.engine.driver import drive
from instar_lab.program.build import build as build_program
from instar_lab.program.build import write
from tests.node.modules import NAME, ModuleNode, build
from tests.node.world import Quiet

KEEPS = """\
def start(context):
    state = context.load() or {"starts": 0}
    context.save({"starts": state["starts"] + 1})

def request(args, context):
    return {}

def stop(context):
    if context.load()["starts"] < 1:
        raise ValueError("nothing was kept")
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "instar.pyz"
    write(build_program("1.0.0"), path)
    return path


@pytest.fixture
def node(folder: Path, program: Path) -> Iterator[ModuleNode]:
    made = ModuleNode(folder / "state", program)
    made.rehearsal_s = 10.0
    yield made
    made.close()


def install(node: ModuleNode, text: str, **changes: Any) -> Progress:
    timeouts = {"ready_s": 2.0, "stop_s": 2.0}
    built = build("1.0.0", text, **{"timeouts": timeouts, "stateful": True, **changes})
    node.server.offer(built)
    node.boot()
    return drive(node.begin_module(built), node.module_target(), Quiet())


def test_a_good_module_passes_and_its_data_stays_as_it_was(node: ModuleNode) -> None:
    data = node.keep('{"starts": 6}')
    end = install(node, KEEPS)
    assert end.state.value == "confirmed", end.reason
    assert end.data["rehearsed_s"] < 10
    assert json.loads((data / "state.json").read_text()) == {"starts": 6}
    assert node.running == node.module.current()


def test_one_without_data_passes_as_well(node: ModuleNode) -> None:
    end = install(node, KEEPS)
    assert end.state.value == "confirmed", end.reason
    assert not node.layout.module(NAME).data.exists(), "the rehearsal has no folder but its own"


BAD = {
    "no start": ("def request(args, context): return {}\n", {}, "no-symbol"),
    "no module": ("raise ImportError('no libthing here')\n", {}, "not-loadable"),
    "start fails": ("def start(context): raise ValueError('bad state')\ndef request(a, c): return {}\n", {}, "module-failed"),
    "stop fails": (KEEPS.replace("< 1", "> 0"), {}, "module-failed"),
    "syntax": ("def start(:\n", {}, "not-loadable"),
    "too much memory": (
        "def start(context): context.held = b'x' * (400 << 20)\ndef request(a, c): return {}\n", {}, "out-of-memory",
    ),
    "ends": ("import os\ndef start(context): os._exit(0)\ndef request(a, c): return {}\n", {}, "rehearsal-failed"),
    "crashes": ("import os\ndef start(context): os.abort()\ndef request(a, c): return {}\n", {}, "rehearsal-failed"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_a_bad_one_never_comes_to_its_trial(node: ModuleNode, case: str) -> None:
    text, changes, code = BAD[case]
    end = install(node, text, **changes)
    assert end.state.value == "reverted"
    assert end.reason is not None
    assert end.reason.code == code, end.reason
    assert node.module.current() == ""
    assert node.reloads == [NAME], "only that there is none"


def test_one_that_hangs_is_ended(node: ModuleNode) -> None:
    node.rehearsal_s = 1.0
    text = "import time\ndef start(context): time.sleep(600)\ndef request(a, c): return {}\n"
    end = install(node, text, timeouts={"ready_s": 0.5, "stop_s": 0.5})
    assert end.reason is not None
    assert "rehearsal" in end.reason.code or "deadline" in end.reason.text, end.reason
    assert node.module.current() == ""
