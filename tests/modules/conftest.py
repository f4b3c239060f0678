"""The modules of this repository, built and run in real runner processes with the limits of their own module.toml.

module = first_day("disk.usage")        # built once a session
module.run({"all": True}).reply         # one-shot
with module.serve(data) as service:     # service; service.ask({"do": "status"})
"""

from __future__ import annotations

import os
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from instar_lab import modules
from tests.runner.compilers import need, need_wasm
from tests.runner.conftest import (
    WITHIN_S,
    Child,
    End,
    Runner,
    ask,
    program,  # noqa: F401  fixtures
    runner,  # noqa: F401
)

ROOT = Path(__file__).resolve().parents[2]
MODULES = ROOT / "modules"
SDK = ROOT / "sdk"
NAMES = sorted(path.parent.name for path in MODULES.glob("*/module.toml"))
STRICT = ["-std=gnu99", "-Wall", "-Wextra", "-Werror", "-O2", "-I", str(SDK)]


@dataclass
class Service:
    """A running service module, and the questions that were asked."""

    child: Child
    count: int = 0

    def answer(self, args: dict[str, Any], within_s: float = WITHIN_S) -> dict[str, Any]:
        self.count += 1
        number = f"q-{self.count}"
        self.child.say({"do": "request", "id": number, "args": args})
        return self.child.until("answer", number, within_s)

    def ask(self, do: str, **args: Any) -> dict[str, Any]:
        answer = self.answer({"do": do} | args)
        assert answer["ok"], (answer, self.child.drain())
        reply: dict[str, Any] = answer["reply"]
        return reply

    def refusal(self, args: dict[str, Any]) -> str:
        answer = self.answer(args)
        assert not answer["ok"], answer
        return str(answer["error"]["text"])

    def stop(self) -> End:
        self.child.say({"do": "stop"})
        end = self.child.finish()
        assert (end.exit_code, end.signal) == (0, 0), (end.lines[-5:], end.stderr)
        return end

    def kill(self) -> None:
        self.child.kill()
        self.child.reap(WITHIN_S)
        self.child.close()


@dataclass
class Module:
    """A module as a node has it: its folder, and what its manifest says."""

    runner: Runner
    folder: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    def request(self, args: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        entry = self.manifest["entry"]
        spec = {
            "name": self.name,
            "version": self.manifest["version"],
            "digest": "0123456789ab" * 8,
            "folder": str(self.folder),
            "runs": self.manifest["runs"],
            "mode": self.manifest["mode"],
            "entry": entry.get(os.uname().machine) or entry["any"],
            "stateful": self.manifest.get("stateful", False),
        }
        limits = self.manifest["limits"] | {"seconds": self.manifest["timeouts"]["run_s"]}
        touches = self.manifest["touches"]
        return ask(spec, args, **({"touches": touches} | limits | more))

    def run(self, args: dict[str, Any] | None = None, cwd: Path | None = None, **more: Any) -> End:
        return self.runner.start(self.request(args, **more), cwd=cwd).finish(120.0)

    def error(self, args: dict[str, Any]) -> str:
        """The words of the refusal; the run must have failed."""
        end = self.run(args)
        assert end.answer.get("ok") is False, (end.lines, end.stderr)
        assert end.exit_code != 0
        return str(end.answer["error"]["text"])

    def start(self, data: Path) -> Service:
        data.mkdir(mode=0o700, exist_ok=True)
        child = self.runner.start(self.request(do="serve", data=str(data)), cwd=data)
        child.until("state", "ready")
        return Service(child)

    @contextmanager
    def serve(self, data: Path) -> Iterator[Service]:
        """Stopped at the end, as the agent does it."""
        service = self.start(data)
        yield service
        service.stop()


def compile_parts(folder: Path, made: str, parts: list[str], *more: str) -> None:
    """One line of [build], with every warning an error."""
    out = folder / made.format(machine=os.uname().machine)
    out.parent.mkdir(exist_ok=True)
    sources = [str(folder / part) for part in parts if not part.startswith("-")]
    flags = [part for part in parts if part.startswith("-")]
    if made.endswith(".wasm"):
        need_wasm()
        command = ["clang", "--target=wasm32", "-ffreestanding", "-nostdlib", "-Wl,--no-entry"]
    else:
        need("cc")
        command = ["cc", "-shared", "-fPIC"]
    done = subprocess.run(
        [*command, *STRICT, "-o", str(out), *sources, *flags, *more],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """built(name): the module's folder as it is packed, by the same code; once a session."""
    made: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("modules") / name
            for out in manifest(name).get("build", {}):
                need_wasm() if out.endswith(".wasm") else need("cc")
            modules.build(MODULES / name, folder)
            made[name] = folder
        return made[name]

    return build


def manifest(name: str) -> dict[str, Any]:
    return tomllib.loads((MODULES / name / "module.toml").read_text())


@pytest.fixture
def first_day(runner: Runner, built: Callable[[str], Path]) -> Callable[[str], Module]:  # noqa: F811
    return lambda name: Module(runner, built(name), manifest(name))


def wait_for(look: Callable[[], Any], what: str, within_s: float = 90.0) -> Any:
    end = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < end, f"expected {what} within {within_s:g} s"
        time.sleep(0.05)
    return found
