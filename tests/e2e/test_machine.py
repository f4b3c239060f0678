"""The machine itself says no: a full disk, a mount without exec, a disk that became read-only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from instar.host.disks import free_bytes
from instar_lab import machine
from tests.e2e.conftest import NEW, OLD, Stage, cli, command, health, look, settled, updates

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")


@pytest.fixture
def disk(stage: Stage) -> Iterator[Path]:
    """A small file system of its own."""
    folder = stage.folder / "d"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=48m", "instar-e2e", str(folder))
    try:
        yield folder
    finally:
        stage.close()
        machine.end_all_naming(folder, 0.5)
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_no_space_for_staging(stage: Stage, disk: Path) -> None:
    node = stage.node(folder=disk / "s")
    pid = health(node)["pid"]
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(free_bytes(disk) - 9_000_000))
    stage.want(NEW, ("agent",))
    look(node)
    entry = settled(node, 1)[0]
    assert (entry["state"], entry["reason"]["code"]) == ("reverted", "no-space")
    assert "bytes free" in entry["reason"]["text"]
    assert sum(word.isdecimal() for word in entry["reason"]["text"].replace("(", "").split()) >= 3
    assert health(node)["pid"] == pid
    node.cli("stop")
    ballast.write_bytes(bytes(ballast.stat().st_size + free_bytes(disk)))
    assert free_bytes(disk) == 0
    assert cli(node, "status").returncode == 0
    node.cli("start")  # a full disk does not stop a start
    stage.connected(node)
    ballast.unlink()  # from now on it may try again by itself at any time
    look(node)
    last = machine.wait_for(
        lambda: next((e for e in node.history() if e["state"] == "confirmed"), None),
        "an update after space came back", 45.0, lambda: node.cli("history") + node.logs(),
    )  # fmt: skip
    assert last["version"] == NEW


def test_a_mount_without_exec_is_named(stage: Stage, disk: Path) -> None:
    node = stage.node(folder=disk / "s")
    mount("-o", "remount,noexec", str(disk))
    stage.want(NEW, ("agent",))
    look(node)
    entry = settled(node, 1)[0]
    assert (entry["state"], entry["reason"]["code"]) == ("reverted", "mounted-noexec")
    assert str(node.state) in entry["reason"]["text"]
    done = command(stage.handed(), "install", "--state", str(disk / "t"), "--service", "none")
    assert done.returncode == 4
    assert "mounted-noexec" in done.stderr
    assert not (disk / "t").exists()
    mount("-o", "remount,exec", str(disk))
    count = len(settled(node, 1))
    updates(node, NEW, ("agent",), before=count)


def test_a_disk_that_became_read_only(stage: Stage, disk: Path) -> None:
    node = stage.node(folder=disk / "s")
    node.cli("stop")
    mount("-o", "remount,ro", str(disk))
    for words in (("start",), ("quarantine", "--clear", "all"), ("uninstall",)):
        done = cli(node, *words)
        assert done.returncode == 4, (words, done)
        assert "read-only" in done.stderr.lower()
        assert "Traceback" not in done.stderr
    for words in (("status",), ("history",), ("quarantine",)):
        assert cli(node, *words).returncode == 0, words
    for entry in ("agent", "updater"):
        done = command(node.layout.launcher, "launch", entry, "--state", str(node.state))
        assert done.returncode == 4, done
        assert "Traceback" not in done.stderr
    mount("-o", "remount,rw", str(disk))
    node.cli("start")
    stage.connected(node)
    assert node.digests()["agent"] == stage.hall.programs[OLD].digest
