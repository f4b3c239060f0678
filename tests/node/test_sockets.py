"""host.sockets.ask: every way in which the other side may fail to answer."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from instar.core.errors import InstarError, MachineError
from instar.host.sockets import MOST_BYTES, ask
from tests.node.world import FakeAgent


def asked(folder: Path, said: dict[str, Any] | bytes | None, timeout_s: float = 30.0) -> dict[str, Any]:
    agent = FakeAgent(folder / "agent.sock", lambda: said)
    try:
        return ask(folder / "agent.sock", {"do": "health"}, timeout_s)
    finally:
        agent.close()


def test_an_answer_comes_back(folder: Path) -> None:
    assert asked(folder, {"pid": 5}) == {"ok": True, "pid": 5}


def test_a_no_keeps_its_code(folder: Path) -> None:
    with pytest.raises(InstarError) as caught:
        asked(folder, b'{"ok": false, "error": {"code": "busy", "text": "not now"}}\n')
    assert (caught.value.code, caught.value.text) == ("busy", "not now")


@pytest.mark.parametrize(
    "said",
    [
        None, b"", b"\n", b"x\n", b"[]\n", b"null\n", b"\xff\xfe\n", b'{"ok": true', b"x" * (MOST_BYTES * 3),
        b"[" * 60_000 + b"\n", b'{"a":' * 10_000 + b"\n",
    ],
    ids=lambda said: repr(said)[:12],
)  # fmt: skip
def test_anything_else_is_no_answer(folder: Path, said: bytes | None) -> None:
    with pytest.raises(MachineError) as caught:
        asked(folder, said)
    assert caught.value.code == "no-answer"


@pytest.mark.parametrize("error", [b"[]", b'"x"', b"5", b"null"])
def test_a_no_in_an_odd_form_is_still_a_no(folder: Path, error: bytes) -> None:
    with pytest.raises(InstarError):
        asked(folder, b'{"ok": false, "error": ' + error + b"}\n")


def test_nobody_listens(folder: Path) -> None:
    with pytest.raises(MachineError) as caught:
        ask(folder / "agent.sock", {}, 1.0)
    assert caught.value.code == "no-answer"


def test_silence_is_bounded(folder: Path) -> None:
    over, spoke = threading.Event(), threading.Event()

    def slow() -> bytes:
        if not over.wait(30.0):
            spoke.set()
        return b"{}\n"

    agent = FakeAgent(folder / "agent.sock", slow)
    with pytest.raises(MachineError):
        ask(folder / "agent.sock", {}, 0.2)
    assert not spoke.is_set(), "it was the agent that ended it"
    over.set()
    agent.close()


def test_a_whole_answer_up_to_the_bound_is_read(folder: Path) -> None:
    said = json.dumps({"ok": True, "x": "y" * 60_000}).encode() + b"\n"
    assert len(asked(folder, said)["x"]) == 60_000
