"""A node with a service module: the same node of memory, whose agent also runs modules.

`ModuleNode` has no release of `demo.watch` at first and 1.0.0 (`first`) on offer; `install` puts one in place as a
confirmed transaction would have left it. The agent of memory follows `current` when it is told to
`reload-module`, and when it starts. Its rehearsal of a module is a call of the function `check(data)` in its main.py.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from instar.core.journal import Begin
from instar.core.releases import Release
from instar.engine.journal import Journal
from instar.host.files import DISK, Disk
from instar.host.line import Line
from instar.targets.kit import TrustedTarget, Verdict
from instar.targets.module_release import ModuleRelease
from instar.trust.module import module_digest
from tests.node.world import Built, FakeServer, FakeSource, Node, member, put, tar_gz

NAME = "demo.watch"
LINE = f"module/{NAME}"
UNKNOWN = b'{"ok": false, "error": {"code": "unknown-command", "text": "no"}}\n'
GOOD = "def check(data): pass\n"


def manifest(files: dict[str, bytes], name: str = NAME, version: str = "1.0.0", **changes: Any) -> bytes:
    listed = [
        {"path": p, "size": len(b), "sha256": hashlib.sha256(b).hexdigest(), "mode": "0644"}
        for p, b in files.items()
    ]
    body = {"format": 1, "kind": "module", "name": name, "version": version, "runs": "python", "mode": "service",
            "entry": {"any": "main.py"}, "timeouts": {"ready_s": 0.2, "stop_s": 0.2}, "files": listed}  # fmt: skip
    return json.dumps({**body, **changes}).encode()


def build(version: str, text: str = GOOD, name: str = NAME, **changes: Any) -> Built:
    """A module's release as the operator made it."""
    files = {"main.py": text.encode(), "doc/notes.txt": b"notes of " + version.encode()}
    said = manifest(files, name, version, **changes)
    members = [member("manifest.json", said), *(member(p, b) for p, b in files.items())]
    return Built(Release(version, module_digest(said)), files, said, tar_gz(members))


class ModuleServer(FakeServer):
    """Offers a module's release, and `program` to the agent. `signed` changes what the metadata says of the module;
    `fault` is its fault alone."""

    def __init__(self, offered: Built, program: Built) -> None:
        super().__init__(offered)
        self._agents = FakeServer(program)
        self.signed: dict[str, Any] = {}
        self._path = ""

    def offer(self, built: Built) -> None:
        self.offered, self.served.data = built, built.archive
        self.sha256 = hashlib.sha256(built.archive).hexdigest()

    def trusted_target(self, target: str, metadata: Path | None = None) -> TrustedTarget:
        self._path = target
        if self._of_module():
            return super().trusted_target(target, metadata)
        return self._agents.trusted_target(target, metadata)

    def verdict(self, line: str, phase: str, tx: str, digest: str, wait_s: float) -> Verdict:
        server = super() if line.startswith("module/") else self._agents
        return server.verdict(line, phase, tx, digest, wait_s)

    def source(self) -> FakeSource:
        return self.served if self._of_module() else self._agents.served

    def custom(self) -> dict[str, Any]:
        r = self.offered.release
        custom = {"kind": "module", "name": NAME, "version": r.version, "digest": r.digest, "mode": "service"}
        return {**custom, **self.signed}

    def _of_module(self) -> bool:
        return self._path.startswith("module/")


class ModuleNode(Node):
    """See the module's docstring. `falling` are releases that do not run; `deaf` an agent that does not follow."""

    def __init__(self, state: Path, disk: Disk = DISK, install: bool = True) -> None:
        super().__init__(state, disk, install=install)
        self.first, self.second = build("1.0.0"), build("1.1.0")
        self.modules = {}
        self.server: ModuleServer = ModuleServer(self.first, self.new)  # type: ignore[assignment]
        self.said = self._answer
        self.running = ""  # the release that the agent runs
        self.module_pid = 1000
        self.falling: set[str] = set()
        self.restarts = 0
        self.deaf = False
        self.knows_modules = True
        self.reloads: list[str] = []
        self.checks: list[dict[str, Any]] = []
        self.others: dict[str, str] = {}

    # --- what the agent does

    def boot(self) -> None:
        if self.agent is None:
            super().boot()
            self.follow()

    def follow(self) -> None:
        """Run what `current` names, as an agent does at its start."""
        line = Line(self.layout.module(NAME))
        release = line.current() if line.is_valid(line.current()) else ""
        if release != self.running:
            self.running, self.restarts = release, 0
            self.module_pid += 1

    def _answer(self) -> dict[str, Any] | bytes | None:
        assert self.agent is not None
        request = self.agent.request
        if request.get("do") == "reload-module":
            if not self.knows_modules:
                return UNKNOWN
            self.reloads.append(request["module"])
            if not self.deaf:
                self.follow()
            return {}
        if request.get("do") == "check-module":
            return self._check(request) if self.knows_modules else UNKNOWN
        if request.get("do") == "modules":
            self.restarts += 1
            row = {
                "name": NAME,
                "restarts": self.restarts,
                "error": "it raised OSError",
                "state": self._state(),
            }
            return {"modules": [row]}
        about = self._healthy()
        if about is None or not self.knows_modules:
            return about
        states = {**self.others, **({NAME: self._state()} if self.running else {})}
        digests = {NAME: self._digest()} if self.running else {}
        return {**about, "modules": states, "digests": digests, "pids": {NAME: self.module_pid}}

    def _check(self, request: dict[str, Any]) -> dict[str, Any]:
        """As the real agent answers (agent/check.py): at first that it goes on."""
        self.checks.append(request)
        if len(self.checks) % 2:
            return {"done": False}
        line, scope = Line(self.layout.module(NAME)), dict[str, Any]()
        release = f"{request['version']}-{request['digest'][:12]}"
        line.check(release)
        try:
            exec((line.folder(release) / "main.py").read_text(), scope)
            scope["check"](Path(request["data"]))
        except Exception as error:  # noqa: BLE001
            code = getattr(error, "code", "module-failed")
            return {"done": True, "passed": False, "code": code, "text": str(error), "seconds": 0.1}
        return {"done": True, "passed": True, "code": "", "text": "", "seconds": 0.1}

    def _state(self) -> str:
        return "failed" if self.running in self.falling else "ok"

    def _digest(self) -> str:
        folder = Line(self.layout.module(NAME)).folder(self.running)
        try:
            return module_digest((folder / "manifest.json").read_bytes())
        except OSError:
            return ""

    # --- what a test does with it

    @property
    def module(self) -> Line:
        return Line(self.layout.module(NAME), self.disk)

    def module_target(self) -> ModuleRelease:
        return ModuleRelease(self.kit(), NAME)

    def install(self, built: Built, before: Built | None = None) -> None:
        line = Line(self.layout.module(NAME))
        for each in (built, before):
            if each is not None:
                line.layout.releases.mkdir(parents=True, exist_ok=True)
                put(line, each)
        line.activate(built.name, fallback=before.name if before else "")

    def keep(self, text: str = '{"seen": 1}') -> Path:
        """Some state of the module."""
        data = self.layout.module(NAME).data
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        (data / "state.json").write_text(text)
        return data

    def begin_module(
        self, built: Built, tx: str = "tx-1", cause: str = "wish", generation: int = 1
    ) -> Journal:
        release, line = built.release, self.module
        target = f"module/{NAME}-{release.version}.tar.gz" if cause == "wish" else ""
        return self.journals.begin(
            Begin(
                tx,
                LINE,
                release.version,
                release.digest,
                target,
                line.current(),
                line.previous(),
                cause,
                generation,
            )
        )
