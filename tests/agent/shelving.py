"""Modules on the disk as fetch-module leaves them, and a child that plays fetch-module."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from instar.agent.shelf import Shelf
from instar.core.releases import Release
from instar.host.layout import Layout
from instar.host.line import Line
from instar.trust.manifest import FileEntry
from instar.trust.module import Limits, ModuleManifest, Timeouts, Touches, module_digest

FETCH = r"""
import json, os, shutil, sys, time
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
plan = words.pop("--plan")
with open(os.path.join(plan, "asked"), "a") as file: file.write(words["--name"] + "\n")
act = json.load(open(os.path.join(plan, "act.json")))
step = act.pop(0) if len(act) > 1 else act[0]
json.dump(act, open(os.path.join(plan, "act.json"), "w"))
time.sleep(step.get("sleep", 0))
while "until" in step and not os.path.exists(step["until"]): time.sleep(0.01)
if step.get("kill"): os.kill(os.getpid(), 9)
if step.get("bring"):
    shutil.copytree(os.path.join(plan, "store", words["--digest"]), step["bring"], dirs_exist_ok=True)
if "error" in step: print(step["error"], file=sys.stderr)
if "exit" in step: sys.exit(step["exit"])
print(json.dumps(step.get("say", {"ok": True, "release": "x"})))
sys.exit(0 if step.get("say", {"ok": True})["ok"] else 5)
"""


class Made(NamedTuple):
    name: str
    version: str
    digest: str

    @property
    def target(self) -> str:
        return f"module/{self.name}-{self.version}.tar.gz"


def write(folder: Path, name: str, version: str = "1.0.0", code: str = "", **more: Any) -> Made:
    """A release in `folder`, valid."""
    body = (code or "def run(args, context): return args\n").encode()
    entry = FileEntry("main.py", len(body), hashlib.sha256(body).hexdigest(), "0644")
    manifest = ModuleManifest(
        name, version, "python", more.pop("mode", "oneshot"), {"any": "main.py"}, (entry,),
        timeouts=Timeouts(**more.pop("timeouts", {})), limits=Limits(**more.pop("limits", {})),
        touches=Touches(**more.pop("touches", {})),
        **more,
    )  # fmt: skip
    data = manifest.encode()
    release = Release(version, module_digest(data))
    place = folder / "modules" / name / "releases" / release.name
    place.mkdir(parents=True)
    (place / "main.py").write_bytes(body)
    (place / "manifest.json").write_bytes(data)
    Line(Layout(folder).module(name)).mark_valid(release.name)
    return Made(name, version, release.digest)


class World:
    """A state folder and its shelf; `plan` says what the fetching child does."""

    def __init__(self, folder: Path) -> None:
        self.layout, self.plan = Layout(folder / "state"), folder / "plan"
        (self.plan / "store").mkdir(parents=True)
        self.layout.state.mkdir()
        command = [sys.executable, "-I", "-S", "-c", FETCH, "--plan", str(self.plan)]
        self.shelf = Shelf(self.layout, command)

    def put(self, name: str, version: str = "1.0.0", code: str = "", **more: Any) -> Made:
        return write(self.layout.state, name, version, code, **more)

    def offer(self, name: str, version: str = "1.0.0", code: str = "", **more: Any) -> Made:
        """One that is not here, but can be fetched."""
        made = write(self.plan / "new" / version, name, version, code, **more)
        (self.plan / "new" / version).rename(self.plan / "store" / made.digest)
        return made

    def act(self, *steps: dict[str, Any]) -> None:
        for step in steps:
            if step.get("bring") is True:
                step["bring"] = str(self.layout.state)
        (self.plan / "act.json").write_text(json.dumps(steps))

    def asked(self) -> list[str]:
        path = self.plan / "asked"
        return path.read_text().split() if path.exists() else []
