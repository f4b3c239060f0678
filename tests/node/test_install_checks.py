"""`instar install` against machines whose service manager cannot start anything, and what it says after that.

The machines are folders, and the managers' programs scripts of ours; nothing of this machine is written.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from instar.cli import install, ready
from instar.core.errors import InputError, MachineError
from instar.host.layout import Layout
from instar.host.records import Node as Enrolled
from instar.host.records import write_node
from instar.host.services.runit import scanned_folder
from instar_lab.program import build
from tests.node.world import Node

RUNIT_RUNS = True
try:
    scanned_folder()
except MachineError:
    RUNIT_RUNS = False
needs_no_runit = pytest.mark.skipif(
    RUNIT_RUNS or os.getuid() != 0, reason="as root, where runit does not run"
)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The node program without a configuration: no server is asked, whatever else goes wrong."""
    path = tmp_path_factory.mktemp("program") / "instar.pyz"
    build.write(build.build("1.0.0"), path)
    return path


def instar(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-I", "-S", str(program), *words]
    return subprocess.run(
        line, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )


def has(root: Path, program: str, text: str = "exit 0") -> None:
    path = root / "usr/bin" / program
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def runs(root: Path, name: str, *words: str) -> None:
    place = root / "proc/77"
    place.mkdir(parents=True)
    (place / "comm").write_text(f"{name}\n")
    (place / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))


def refused(manager: str, root: Path, start: bool = True) -> str:
    with pytest.raises(MachineError) as caught:
        ready.check(manager, start, root)
    assert caught.value.code == "no-manager"
    assert caught.value.text.startswith(f"cannot install for {manager}: expected ")
    assert "another --service" in caught.value.text
    return caught.value.text


@needs_no_runit
def test_install_for_a_runit_that_does_not_run_is_refused_first(program: Path, tmp_path: Path) -> None:
    state = tmp_path / "s"
    done = instar(program, "install", "--service", "runit", "--state", str(state))
    assert (done.returncode, "(no-manager)" in done.stderr) == (4, True), done.stderr
    assert "runsvdir" in done.stderr or "the program sv" in done.stderr
    assert "--no-start" in done.stderr
    assert not state.exists()


def test_runit_needs_sv_and_runsvdir_for_a_start_only(tmp_path: Path) -> None:
    ready.check("runit", False, tmp_path)
    assert "the program sv" in refused("runit", tmp_path)
    has(tmp_path, "sv")
    said = refused("runit", tmp_path)
    assert "a running runsvdir, got none" in said
    assert "--no-start" in said
    runs(tmp_path, "runsvdir", "runsvdir", "-P", "/etc/service")
    ready.check("runit", True, tmp_path)


def test_openrc_needs_its_programs_and_to_have_started_the_machine(tmp_path: Path) -> None:
    for start in (True, False):  # the files that are written are told to rc-update in any case
        said = refused("openrc", tmp_path, start)
        assert "the program rc-update" in said
        assert "--no-start" not in said
    has(tmp_path, "rc-update")
    ready.check("openrc", False, tmp_path)
    assert "the program rc-service" in refused("openrc", tmp_path)
    has(tmp_path, "rc-service")
    assert "a machine that OpenRC has started" in refused("openrc", tmp_path)
    (tmp_path / "run/openrc").mkdir(parents=True)
    (tmp_path / "run/openrc/softlevel").touch()
    ready.check("openrc", True, tmp_path)


def test_sysv_needs_service_for_a_start_only(tmp_path: Path) -> None:
    ready.check("sysv", False, tmp_path)
    assert "the program service" in refused("sysv", tmp_path)
    has(tmp_path, "service")
    ready.check("sysv", True, tmp_path)


def test_supervisor_needs_an_answer_of_supervisord(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready.check("supervisor", False, tmp_path)
    assert "the program supervisorctl" in refused("supervisor", tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/usr/bin:{os.environ['PATH']}")
    for text in ("echo unix:///x.sock no such file; exit 1", "echo unix:///x.sock no such file; exit 0"):
        has(tmp_path, "supervisorctl", text)
        said = refused("supervisor", tmp_path)
        assert "a running supervisord" in said
        assert "unix:///x.sock no such file" in said
    has(tmp_path, "supervisorctl", '[ "$1" = pid ] && echo 4711')
    ready.check("supervisor", True, tmp_path)


def test_systemd_must_answer_and_run_for_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}/usr/bin:{os.environ['PATH']}")
    for start in (True, False):
        assert "the program systemctl" in refused("systemd", tmp_path, start)
    has(tmp_path, "systemctl", "exit 1")
    assert "fails without a word" in refused("systemd", tmp_path, start=False)
    has(tmp_path, "systemctl", "echo not booted with systemd >&2; exit 1")
    for start in (True, False):
        said = refused("systemd", tmp_path, start)
        assert "not booted with systemd" in said
        assert "--no-start" not in said
    has(tmp_path, "systemctl")  # in a chroot it does what can be done there
    ready.check("systemd", False, tmp_path)
    assert "--no-start" in refused("systemd", tmp_path)
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    ready.check("systemd", True, tmp_path)


def test_nobody_is_needed_for_none(tmp_path: Path) -> None:
    ready.check("none", True, tmp_path)


@needs_no_runit
def test_a_start_that_fails_says_what_is_there_and_how_to_go_on(node: Node) -> None:
    (node.layout.state / "service.json").write_text('{"v":1,"manager":"runit"}')
    node.layout.identity.mkdir(parents=True, exist_ok=True)
    write_node(node.layout, Enrolled("n-1", "https://h:1", "default", 0.0))
    args = argparse.Namespace(state=node.layout.state, start=True, json=True)
    with pytest.raises(MachineError) as caught:
        install.begin(args, "n-1")
    state = str(node.layout.state)
    assert caught.value.code == "no-runsvdir"
    assert caught.value.text.startswith("cannot start what is installed: ")
    for part in ("n-1 is enrolled", f"installed below {state}", f"`instar start --state {state}`",
                 f"`instar uninstall --state {state}`"):  # fmt: skip
        assert part in caught.value.text
    args.start = False
    assert install.begin(args, "n-1") == []


def test_a_program_without_a_configuration_names_the_way_to_one(program: Path, tmp_path: Path) -> None:
    done = instar(program, "install", "--service", "none", "--state", str(tmp_path / "s"))
    assert done.returncode == 2
    assert "(no-configuration)" in done.stderr
    assert "`instarctl program download`" in done.stderr
    assert "--embed" in done.stderr
    assert not (tmp_path / "s").exists()


def test_an_install_by_the_launcher_of_a_node_says_that_it_is_one(program: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "s")
    layout.node.parent.mkdir(parents=True)
    layout.node.write_text("{}")
    done = instar(program, "install", "--service", "none", "--state", str(layout.state))
    assert (done.returncode, "(already-installed)" in done.stderr) == (2, True), done.stderr


def test_refusals_stay_what_they_were(node: Node) -> None:
    with pytest.raises(InputError) as caught:
        install.check_machine(Layout(Path("/proc/1")), Path(__file__), "none", start=True)
    assert caught.value.code == "not-empty"
