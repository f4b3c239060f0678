"""All six as an operator meets them: published, fetched by a real node at the first job, answered by the API (R4)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instar_lab import machine
from instar_lab.fleet import Fleet
from instar_lab.program import build
from tests.modules.conftest import MODULES, NAMES
from tests.runner.compilers import need, need_wasm

SERVICES = ("file.integrity", "inventory")
PEOPLE_S = 120.0


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    need("cc")
    need_wasm()
    with Fleet(1) as made:
        program = build.build("1.0.0")
        made.server.publish(program)
        made.server.want("1.0.0", ("agent", "updater"), "default")
        for name in NAMES:
            made.server.publish_module(MODULES / name)
        for name in SERVICES:
            made.server.want("1.0.0", (f"module/{name}",), "default")
        made.add_nodes(program, "[trial]\nhold_s = 0.3\n\n[updater]\npoll_s = 2.0\n")
        yield made


def answer(fleet: Fleet, module: str, args: dict[str, Any] | None = None) -> dict[str, Any]:
    body = {"module": module, "args": args or {}, "select": {"nodes": [fleet.nodes[0].id]}, "wait_s": 25.0}
    (row,) = fleet.server.api.post("/jobs", body)["rows"]
    return dict(row)


def reply(fleet: Fleet, module: str, args: dict[str, Any] | None = None) -> dict[str, Any]:
    """The module's reply; a service is waited for."""

    def done() -> dict[str, Any] | None:
        row = answer(fleet, module, args)
        return row if row["state"] == "done" else None

    row = machine.wait_for(
        done, f"a reply of {module}", PEOPLE_S, lambda: f"{answer(fleet, module, args)}\n{fleet.logs()}"
    )
    return dict(row["reply"])


def test_the_four_that_run_once(fleet: Fleet) -> None:
    assert reply(fleet, "interfaces.list", {"name": "lo"})["interfaces"][0]["kind"] == "loopback"
    assert "/" in [one["mount"] for one in reply(fleet, "disk.usage")["file_systems"]]
    assert reply(fleet, "service.status", {"names": ["ssh"]})["services"][0]["name"] == "ssh"
    if shutil.which("dpkg-query"):
        packages = reply(fleet, "packages.list", {"match": "libc6"})
        assert "libc6" in [one["name"] for one in packages["packages"]]
        assert reply(fleet, "packages.list")["count"] > 100


def test_the_two_that_stay(fleet: Fleet, tmp_path: Path) -> None:
    found = reply(fleet, "inventory", {"do": "get", "part": "system"})
    assert found["system"]["kernel"] == os.uname().release
    (tmp_path / "old").touch()
    reply(fleet, "file.integrity", {"do": "watch", "paths": [str(tmp_path)], "every_s": 1.0})

    def settled() -> bool:
        return bool(reply(fleet, "file.integrity", {"do": "status"})["settled"])

    machine.wait_for(settled, "the base", PEOPLE_S)
    (tmp_path / "new").touch()

    def told() -> list[str]:
        changes = reply(fleet, "file.integrity", {"do": "changes"})["changes"]
        return [f"{one['change']} {one['path']}" for one in changes]

    machine.wait_for(told, "the change", PEOPLE_S)
    assert told() == [f"added {tmp_path / 'new'}"]

    # Stopped and started again: what was told is still known, and only what is new is new.
    body = {"modules": ["file.integrity"], "select": {"nodes": [fleet.nodes[0].id]}, "wait_s": 30.0}
    (row,) = fleet.server.api.post("/restarts", body)["rows"]
    assert row["state"] == "done", row
    assert told() == [f"added {tmp_path / 'new'}"]


def test_a_wrong_argument_comes_back_as_words(fleet: Fleet) -> None:
    row = answer(fleet, "interfaces.list", {"nme": "lo"})
    assert (row["state"], row["code"]) == ("failed", "module-failed")
    assert "expected 'name' or 'all', got 'nme'" in row["text"]
    row = answer(fleet, "disk.usage", {"path": "etc"})
    assert "expected an absolute path as 'path'" in row["text"]
