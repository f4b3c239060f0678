"""Broken programs are broken in the way they say, and in no other."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from instar.core.errors import InputError
from instar_lab import machine
from instar_lab.program import build, variants

# What the wrappers wrap here: a program whose entry points only say that they were reached.
PROBE = """\
import sys
from instar.host import points
from instar.modules import selftest

def main():
    argv = sys.argv[1:]
    points.reach("probe:a")
    points.reach("probe:b")
    print("ran", argv[0], selftest.answer("01", "d", "1")[:8], flush=True)
    if "--linger" in argv:
        import time
        time.sleep(20)
    return 0
"""


@pytest.fixture(params=sorted(variants.VARIANTS))
def any_variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@functools.cache
def made(name: str) -> build.Program:
    return variants.variant(name, "1.2.0") if name else build.build("1.2.0")


def probe(name: str, folder: Path) -> Path:
    """The variant with its real wrapper and __main__, and entry points that are only probes."""
    whole = folder / "whole.pyz"
    build.write(made(name), whole)
    path = folder / "probe.pyz"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            if not info.filename.startswith("instar/__main__.py"):
                new.writestr(info, old.read(info))
        new.writestr("instar/__main__.py", PROBE)
    return path


def run(path: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-S", str(path), *args],
        capture_output=True, text=True, timeout=120, check=False, env={"PATH": os.environ["PATH"], **env},
    )  # fmt: skip


def test_every_variant_is_a_build_of_the_version_asked_for(any_variant: str) -> None:
    assert made(any_variant).version == "1.2.0"
    assert made(any_variant).digest != made("").digest


def test_every_variant_leaves_other_entries_alone(any_variant: str, tmp_path: Path) -> None:
    done = run(probe(any_variant, tmp_path), "status")
    assert (done.returncode, done.stdout[:10]) == (0, "ran status"), done.stderr


def test_unknown_variant() -> None:
    with pytest.raises(InputError) as refused:
        variants.variant("perfect", "1.2.0")
    assert refused.value.code == "unknown-variant"


@pytest.mark.parametrize("args", [("agent",), ("agent", "--rehearse"), ("updater",)])
def test_does_not_start(args: tuple[str, ...], tmp_path: Path) -> None:
    done = run(probe("does-not-start", tmp_path), *args)
    assert done.returncode == 1
    assert "instar.needed" in done.stderr
    assert done.stdout == ""


def ignores_term(pid: int) -> bool:
    said = Path(f"/proc/{pid}/status").read_text()
    return bool(int(said.split("SigIgn:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1)


def test_hangs_and_ignores_term(tmp_path: Path) -> None:
    path = probe("hangs", tmp_path)
    process = subprocess.Popen([sys.executable, "-I", "-S", str(path), "agent"], stdout=subprocess.PIPE)
    try:
        machine.wait_for(lambda: ignores_term(process.pid), "one that ignores TERM", 60.0)
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
    finally:
        process.kill()
        out, _ = process.communicate(timeout=60)
    assert out == b""


def test_wrong_reply_only_in_the_runner(tmp_path: Path) -> None:
    path = probe("wrong-reply", tmp_path)
    right = run(path, "agent").stdout.split()[2]
    wrong = run(path, "runner").stdout.split()[2]
    assert right == "280120cc"  # of SHA-256 of '01:d:1'
    assert wrong != right


def test_crashes_once_activated_but_rehearses(tmp_path: Path) -> None:
    path = probe("crashes-once-activated", tmp_path)
    assert run(path, "agent", "--rehearse").returncode == 0
    crashed = run(path, "agent", "--linger")
    assert crashed.returncode == -signal.SIGABRT
    assert crashed.stdout.startswith("ran agent")


class TestKilledAt:
    """The plan says where; arrivals and kills are counted in files."""

    def plan(self, folder: Path, **plan: object) -> None:
        (folder / "lab-kill-plan.json").write_text(json.dumps(plan))

    def test_kills_at_the_named_point(self, tmp_path: Path) -> None:
        path = probe("killed-at", tmp_path)
        self.plan(tmp_path, kills=[{"role": "updater", "point": "probe:b", "count": 1}])
        assert run(path, "agent", "--state", str(tmp_path)).returncode == 0
        killed = run(path, "updater", "--state", str(tmp_path))
        assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "")
        assert run(path, "updater", "--state", str(tmp_path)).returncode == 0, "a plan is used up once"

    def test_counts_arrivals_of_all_processes(self, tmp_path: Path) -> None:
        path = probe("killed-at", tmp_path)
        self.plan(tmp_path, kills=[{"role": "agent-rehearse", "point": "probe:a", "count": 3}])
        ends = [run(path, "agent", "--rehearse", "--state", str(tmp_path)).returncode for _ in range(4)]
        assert ends == [0, 0, -signal.SIGKILL, 0]

    def test_second_kill_is_armed_by_the_first(self, tmp_path: Path) -> None:
        path = probe("killed-at", tmp_path)
        first = {"role": "updater", "point": "probe:b", "count": 2}
        second = {"role": "updater", "point": "probe:a", "count": 1}
        self.plan(tmp_path, kills=[first, second])
        ends = [run(path, "updater", "--state", str(tmp_path)).returncode for _ in range(4)]
        assert ends == [0, -signal.SIGKILL, -signal.SIGKILL, 0]

    def test_records_points(self, tmp_path: Path) -> None:
        path = probe("killed-at", tmp_path)
        record = tmp_path / "points.txt"
        elsewhere = tmp_path / "plan.json"
        elsewhere.write_text(json.dumps({"record": str(record)}))
        run(path, "launch", INSTAR_LAB_KILL_PLAN=str(elsewhere))
        assert record.read_text() == "launch probe:a\nlaunch probe:b\n"

    def test_without_a_plan_it_is_sound(self, tmp_path: Path) -> None:
        assert run(probe("killed-at", tmp_path), "updater", "--state", str(tmp_path)).returncode == 0
