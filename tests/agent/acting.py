"""A stand-in for the runner: a real process that speaks the control line and acts as `act.json` in its data
folder says. With it, service modules are made and looked at without a built program."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from instar.agent.runners import Runners
from instar.agent.shelf import Module
from instar.agent.supervisor import Supervisor
from instar.host.clock import Clock
from instar.host.layout import Layout
from instar.trust.manifest import FileEntry
from instar.trust.module import ModuleManifest, Timeouts

RUNNER = r"""
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
reader = os.fdopen(os.dup(3), "rb")
def say(**message): os.write(3, json.dumps(message).encode() + b"\n")
first = json.loads(reader.readline())
name = first["module"]["name"]
def note(word):
    with open("../../../order", "a") as file: file.write(f"{name} {word} {first['module']['version']}\n")
try: act = json.load(open("act.json"))
except FileNotFoundError: act = {}
try: state = json.load(open("state.json"))
except FileNotFoundError: state = {"starts": 0}
def save():
    with open("state.new", "w") as file: json.dump(state, file)
    os.replace("state.new", "state.json")
state["starts"] += 1
save()
if act.get("deaf"): signal.signal(signal.SIGTERM, signal.SIG_IGN)
say(state="starting")
if act.get("error"):
    say(ok=False, error={"code": "wrong-abi", "text": act["error"]}); sys.exit(1)
time.sleep(act.get("start_s", 0))
note("start")
say(state="ready")
if "fall_s" in act and state["starts"] <= act.get("falls", 1000):
    time.sleep(act["fall_s"])
    print("about to fall", file=sys.stderr, flush=True)
    if act.get("exit") is None: os.kill(os.getpid(), signal.SIGSEGV)
    sys.exit(act["exit"])
for line in act.get("says", []): say(**line)
def stop():
    note("asked")
    end = time.monotonic() + act.get("busy_s", 0)
    while time.monotonic() < end:
        say(stopping="busy", text="an operation"); time.sleep(0.1)
    while act.get("deaf"): time.sleep(1)
    state["saved"] = True
    save()
    say(stopping="ready")
    note("stop")
    sys.exit(0)
for raw in reader:
    said = json.loads(raw)
    if said["do"] == "stop": stop()
    args, key = said["args"], said["id"]
    if args.get("die"): os._exit(3)
    if args.get("silent"): continue
    if args.get("wrong"): say(answer=key, ok=True, reply="no object"); continue
    if args.get("fail"): say(answer=key, ok=False, error={"code": "module-failed", "text": "it cannot"}); continue
    say(id=key, progress=0.5, text="half")
    time.sleep(args.get("sleep", 0))
    say(answer=key, ok=True, reply={"starts": state["starts"], "pid": os.getpid(), **args})
stop()
"""


def module(
    name: str,
    version: str = "1.0.0",
    depends: tuple[str, ...] = (),
    stop_s: float = 60.0,
    ready_s: float = 60.0,
) -> Module:
    entry = FileEntry("run.py", 0, "0" * 64, "0644")
    manifest = ModuleManifest(
        name, version, "python", "service", {"any": "run.py"}, (entry,),
        stateful=True, depends=depends, timeouts=Timeouts(ready_s=ready_s, stop_s=stop_s),
    )  # fmt: skip
    digest = f"{name}-{version}".encode().hex().ljust(96, "0")
    return Module(manifest, Path("/nowhere"), digest, f"{version}-{digest[:12]}")


class FakeShelf:
    """What the disk would say."""

    def __init__(self) -> None:
        self.found: dict[str, Module] = {}
        self.used: list[str] = []

    def mark_used(self, module: Module) -> None:
        self.used.append(module.manifest.name)

    def services(self) -> dict[str, Module]:
        return dict(self.found)


class World:
    """A state folder, its modules, and a supervisor of them."""

    def __init__(self, folder: Path) -> None:
        self.layout = Layout(folder)
        self.shelf = FakeShelf()
        self.script = folder / "runner.py"
        self.script.write_text(RUNNER)
        self.changes = 0
        self.runners = Runners([sys.executable, "-I", "-S", str(self.script)], grouped=False)
        self.supervisor = self.supervise()

    def supervise(self) -> Supervisor:
        return Supervisor(self.layout, self.shelf, self.runners, Clock(), lambda: 0.0, self._changed)  # type: ignore[arg-type]

    def _changed(self) -> None:
        self.changes += 1

    def add(self, made: Module, **act: Any) -> None:
        name = made.manifest.name
        data = self.layout.module(name).data
        data.mkdir(parents=True, exist_ok=True)
        self._write(name, act)
        self.shelf.found[name] = made

    def act(self, name: str, **act: Any) -> None:
        self._write(name, act)

    def _write(self, name: str, act: dict[str, Any]) -> None:
        """Whole at once: the module may be reading it."""
        path = self.layout.module(name).data / "act.json"
        path.with_suffix(".new").write_text(json.dumps(act))
        path.with_suffix(".new").rename(path)

    def kept(self, name: str) -> dict[str, Any]:
        """What the module's state is on the disk."""
        found: dict[str, Any] = json.loads((self.layout.module(name).data / "state.json").read_bytes())
        return found

    def order(self) -> list[str]:
        try:
            return (self.layout.state / "order").read_text().splitlines()
        except FileNotFoundError:
            return []

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.supervisor.describe() if row["name"] == name)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Supervisor]:
        """While the supervisor runs. Nothing of it is left afterwards."""
        task = asyncio.create_task(self.supervisor.run())
        try:
            await self.until(lambda: set(self.supervisor.states()) == set(self.shelf.found))
            yield self.supervisor
            if task.done():
                task.result()
        finally:
            await self.supervisor.stop_all(60.0, "the test")
            task.cancel()
            await asyncio.wait([task])
            await self.runners.close()

    async def until(self, true: Callable[[], bool], within_s: float = 60.0) -> None:
        async with asyncio.timeout(within_s):
            while not true():
                await asyncio.sleep(0.01)

    async def all_ok(self) -> None:
        await self.until(lambda: set(self.supervisor.states().values()) == {"ok"})

    async def asked(self, name: str, **args: Any) -> dict[str, Any]:
        return await self.supervisor.request(name, args, 60.0, lambda _: None)
