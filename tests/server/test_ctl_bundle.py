"""`instarctl bundle`: builds, tells, and refuses, offline."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from instar_server.ctl.main import app
from tests.node.boot.test_disks import image


def test_bundle_is_built_and_shown(tmp_path: Path) -> None:
    root, kernel, out = tmp_path / "root", tmp_path / "kernel", tmp_path / "web.bundle"
    root.write_bytes(bytes(range(256)) * 400)
    kernel.write_bytes(image({".linux": b"k" * 5000, ".initrd": b"i" * 5000, ".cmdline": b"quiet"}))
    words = ["bundle", "build", "--root", str(root), "--kernel", str(kernel), "--name", "web"]
    words += ["--version", "1.1.0", "--compatible", "board-7", "--out", str(out), "--json"]
    built = json.loads(CliRunner().invoke(app, words).stdout)
    assert built["target"] == "os/web-1.1.0.bundle"
    assert built["custom"]["compatible"] == ["board-7"]
    shown = CliRunner().invoke(app, ["bundle", "show", str(out), "--json"])
    assert json.loads(shown.stdout) == built


def test_what_is_no_kernel_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"no image")
    words = ["bundle", "build", "--root", str(tmp_path / "f"), "--kernel", str(tmp_path / "f"), "--name", "w"]
    words += ["--version", "1.1.0", "--compatible", "b", "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "cannot read the kernel image" in done.output
    assert not (tmp_path / "o").exists()
