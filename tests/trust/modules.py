"""Modules to pack and to fetch: sources, forged releases, and a node with its `fetch-module`.

`fetch-module` runs as it does on a node: from the built program, over mTLS, with a real repository behind it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instar.host.layout import Layout
from instar.host.line import Line
from instar.trust.module import module_digest
from instar_server.trust.pack import Release
from tests.node.world import member, tar_gz
from tests.trust.gateway import Gateway, Handler
from tests.trust.world import World, now

NAME = "demo.once"
PATH = f"module/{NAME}-1.0.0.tar.gz"
TOML = """\
name = "demo.once"
version = "{version}"
about = "Says what it was asked"
runs = "python"
mode = "oneshot"

[entry]
any = "main.py"
"""
MAIN = "def run(args, context):\n    return args\n"
Source = Callable[..., Path]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """source({"main.py": …}, version="1.0.0", toml=…) -> a module's folder"""

    def make(files: dict[str, str | bytes] | None = None, version: str = "1.0.0", toml: str = TOML) -> Path:
        folder = tmp_path / f"source-{len(list(tmp_path.glob('source-*')))}"
        folder.mkdir()
        (folder / "module.toml").write_text(toml.replace("{version}", version))
        for path, content in (files if files is not None else {"main.py": MAIN}).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder

    return make


def forged(manifest: bytes, files: dict[str, bytes], path: str = PATH, **custom: str) -> Release:
    """What signers were made to sign: any manifest, any files, any words about them."""
    members = [member("manifest.json", manifest), *(member(name, data) for name, data in files.items())]
    archive = tar_gz(members)
    said = {"kind": "module", "name": NAME, "version": "1.0.0", "digest": module_digest(manifest), "runs": "python",
            "mode": "oneshot", **custom}  # fmt: skip
    return Release(path, archive, hashlib.sha256(archive).hexdigest(), said)


def manifest(contents: dict[str, bytes], **changes: Any) -> bytes:
    listed = [
        {"path": p, "size": len(b), "sha256": hashlib.sha256(b).hexdigest(), "mode": "0644"}
        for p, b in contents.items()
    ]
    body = {"format": 1, "kind": "module", "name": NAME, "version": "1.0.0", "runs": "python", "mode": "oneshot",
            "entry": {"any": "main.py"}, "files": listed}  # fmt: skip
    return json.dumps({**body, **changes}).encode()


FILES = {"main.py": MAIN.encode()}
GOOD = manifest(FILES)


class RangeHandler(Handler):
    """Also serves targets, with ranges; `world.tamper` may hold bytes for a target's path, `world.cut_at` ends answers."""

    def do_GET(self) -> None:
        path = self.path.removeprefix("/v1/targets/")
        if path == self.path:
            super().do_GET()
            return
        world = self.server.world
        file = world.repository.target_file(path)
        data = world.tamper.get(path) or (file.read_bytes() if file else b"")
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        world.asked.append(f"{path}@{start}")
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        cuts: list[int] = world.cut_at  # type: ignore[attr-defined]
        end = cuts.pop(0) if cuts else len(data)
        self.wfile.write(data[start:end])
        if end < len(data):
            self.close_connection = True


class Fetcher:
    """One node and its `fetch-module`."""

    def __init__(self, world: World, program: Path) -> None:
        self.world, self.program = world, program
        self.layout = Layout(world.trust.parent)
        self.world.cut_at = []  # type: ignore[attr-defined]

    @property
    def line(self) -> Line:
        return Line(self.layout.module(NAME))

    def publish(self, release: Release) -> Release:
        data = self.world.sign_targets(self.world.with_release(release))
        self.world.repository.publish_targets(data, now())
        self.world.targets_bytes = data
        return release

    def command(self, release: Release, **options: str) -> list[str]:
        words = {
            "name": NAME,
            "version": "1.0.0",
            "digest": release.digest,
            "target": PATH,
            "within": "60",
            **options,
        }
        flags = [part for name, value in words.items() for part in (f"--{name}", value)]
        return [
            sys.executable,
            "-I",
            "-S",
            str(self.program),
            "fetch-module",
            "--state",
            str(self.layout.state),
            *flags,
        ]

    def start(self, release: Release, **options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(release, **options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={"PATH": os.environ["PATH"]},
        )  # fmt: skip

    def fetch(self, release: Release, **options: str) -> dict[str, Any]:
        child = self.start(release, **options)
        out, err = child.communicate(timeout=60)
        lines = out.splitlines()
        assert len(lines) == 1, (child.returncode, out, err)
        answer: dict[str, Any] = json.loads(lines[0])
        assert (child.returncode == 0) is answer["ok"], (child.returncode, answer)
        return answer

    def refused(self, release: Release, code: str, kind: str, *words: str, **options: str) -> None:
        """It says no in the right words, and nothing of it can be run."""
        before = sorted(path for path in self.layout.state.rglob("*") if "modules" not in path.parts)
        answer = self.fetch(release, **options)
        assert answer["ok"] is False
        assert (answer["error"]["code"], answer["kind"]) == (code, kind), answer
        for word in words:
            assert word in answer["error"]["text"], answer
        assert not [name for name in self.line.names() if self.line.is_valid(name)]
        assert not list(self.layout.state.rglob("evil*"))
        after = sorted(path for path in self.layout.state.rglob("*") if "modules" not in path.parts)
        assert [p for p in after if p not in before and "trust" not in p.parts] == []


@pytest.fixture
def node(world: World, gateway: Gateway, pyz: Path) -> Fetcher:
    gateway.RequestHandlerClass = RangeHandler
    return Fetcher(world, pyz)
