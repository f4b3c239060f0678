"""docs/writing-modules.md: its examples are files that are built and run here, and it shows them as they are."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from instar.trust.module import Limits, Timeouts, Touches
from instar_server.trust.module_source import pack_module
from tests.runner.compilers import EXAMPLES, ROOT, example
from tests.runner.conftest import MakeModule, Runner

DOCUMENT = (ROOT / "docs" / "writing-modules.md").read_text()
NAMES = sorted(folder.name for folder in EXAMPLES.iterdir())


def made(name: str, make_module: MakeModule) -> tuple[dict[str, Any], dict[str, Any]]:
    """-> (the module of a request, its `touches` as the agent would pass them)."""
    about, files = example(name)
    entry: Any = about["entry"]
    path = entry.get("any") or f"{os.uname().machine}.so"
    module = make_module(
        str(about["name"]),
        files,
        runs=str(about["runs"]),
        mode=str(about["mode"]),
        entry=path,
        stateful=bool(about.get("stateful")),
    )
    touches: Any = about.get("touches", {})
    return module, touches


def test_each_kind_has_its_example() -> None:
    kinds = {tomllib.loads((EXAMPLES / name / "module.toml").read_text())["runs"] for name in NAMES}
    assert kinds == {"python", "native", "wasm"}


def test_the_python_example_runs(runner: Runner, make_module: MakeModule) -> None:
    module, touches = made("python", make_module)
    reply = runner.run(module, {"minutes": 15}, touches=touches).reply
    assert reply["up_s"] > 0
    assert reply["text"].startswith("up ")
    assert runner.run(module, {"minutes": 2}, touches=touches).code == "module-failed"


def test_the_native_example_runs(runner: Runner, make_module: MakeModule) -> None:
    module, touches = made("native", make_module)
    assert runner.run(module, {"below": 100}, touches=touches).reply == {"primes": 25}
    end = runner.run(module, {"below": 3_000_000}, touches=touches)
    assert end.reply == {"primes": 216_816}
    assert end.said("progress")
    assert (
        runner.run(module, {"below": 1}, touches=touches).answer["error"]["text"].startswith("cannot count")
    )


def test_the_wasm_example_runs(runner: Runner, make_module: MakeModule) -> None:
    module, touches = made("wasm", make_module)
    lines = Path("/etc/os-release").read_text().splitlines()
    wanted = next((line[3:].strip('"') for line in lines if line.startswith("ID=")), "")
    assert runner.run(module, touches=touches).reply == {"id": wanted}
    assert runner.run(module).code == "module-failed"  # nothing is granted, nothing can be read


def test_the_service_example_keeps_its_notes(runner: Runner, make_module: MakeModule, tmp_path: Path) -> None:
    module, touches = made("service", make_module)
    for round_ in (1, 2):
        child = runner.serve(module, tmp_path / "data", touches=touches)
        child.until("state", "ready")
        child.say({"do": "request", "id": "a", "args": {"do": "add", "text": f"note {round_}"}})
        assert child.until("answer", "a")["reply"] == {"notes": [f"note {n}" for n in range(1, round_ + 1)]}
        child.say({"do": "stop"})
        child.until("stopping", "ready")
        assert child.finish().exit_code == 0
    state = json.loads((tmp_path / "data" / "state.json").read_text())
    assert state == {"notes": ["note 1", "note 2"]}


@pytest.mark.parametrize("name", NAMES)
def test_each_example_can_be_packed(name: str, tmp_path: Path) -> None:
    """As `instarctl module pack` does it, for this machine's entry."""
    about, files = example(name)
    for path, content in files.items():
        (tmp_path / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    for file in (EXAMPLES / name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    release = pack_module(tmp_path, machines=[os.uname().machine])
    assert release.path == f"module/{about['name']}-1.0.0.tar.gz"


def test_the_document_shows_the_examples_as_they_are() -> None:
    shown = dict(re.findall(r"<!-- (\S+) -->\n```\w*\n(.*?)```", DOCUMENT, re.DOTALL))
    files = {
        str(file.relative_to(EXAMPLES)): file.read_text()
        for name in NAMES
        for file in (EXAMPLES / name).iterdir()
    }
    assert shown == files


@pytest.mark.parametrize(
    ("section", "kind"), [("timeouts", Timeouts), ("limits", Limits), ("touches", Touches)]
)
def test_every_field_of_the_manifest_is_described(section: str, kind: type) -> None:
    table = DOCUMENT[DOCUMENT.index("## module.toml") : DOCUMENT.index("## The three kinds")]
    missing = [name for name in kind.__slots__ if f"`{section}.{name}`" not in table]  # type: ignore[attr-defined]
    assert not missing


def test_every_code_of_the_runner_is_described() -> None:
    """Those that its own source raises, and those that it takes from the contract with the agent."""
    source = "".join(file.read_text() for file in (ROOT / "node/src/instar/runner").glob("*.py"))
    codes = set(re.findall(r'(?:Error|Wrong|_unusable)\(\s*(?:\w+, )?"([a-z]+(?:-[a-z0-9]+)+)"', source))
    codes |= {"wrong-magic", "wrong-abi"}
    missing = sorted(code for code in codes if f"`{code}`" not in DOCUMENT)
    assert len(codes) > 8
    assert not missing
