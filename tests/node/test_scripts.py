"""cli.scripts: what each manager is given to start the roles with, and which manager a machine has."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from instar.cli import scripts
from instar.core.errors import InputError
from instar.host.interpreter import FLAGS
from instar.host.layout import LINES, Layout

ODD = Path('/srv/a node\'s $HOME; 100% #1 "x"')


@pytest.mark.parametrize("manager", ["sysv", "openrc", "runit"])
def test_scripts_are_good_shell_for_any_path(manager: str, tmp_path: Path) -> None:
    for path, (text, mode) in scripts.filled(manager, Layout(ODD), tmp_path).items():
        assert mode == 0o755, path
        subprocess.run(["sh", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize("role", LINES)
def test_run_script_starts_the_launcher_with_the_very_path(role: str, tmp_path: Path) -> None:
    state = tmp_path / ODD.name
    text, _ = scripts.filled("runit", Layout(state), tmp_path)[tmp_path / f"etc/sv/instar-{role}/run"]
    launcher = Layout(state).launcher
    launcher.parent.mkdir(parents=True)
    launcher.write_text("import sys; print(sys.argv[1:])")
    said = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True).stdout
    assert said == f"{['launch', role, '--state', str(state)]}\n"


def test_openrc_script_survives_being_evaluated_twice(tmp_path: Path) -> None:
    layout = Layout(ODD)
    ((text, _),) = scripts.filled("openrc", layout, tmp_path).values()
    values = "\n".join(line for line in text.splitlines() if line.startswith(("command", "output_log")))
    twice = values + "\neval printf \"%s'\\n'\" $command $command_args $output_log"
    said = subprocess.run(["sh", "-c", twice], capture_output=True, text=True, check=True).stdout.splitlines()
    words = [sys.executable, *FLAGS, str(layout.launcher), "keep", "--state", str(ODD), "--by", "openrc"]
    assert said == [*words, str(layout.run / "keeper.log")]


def test_supervisor_sections(tmp_path: Path) -> None:
    import configparser

    state = Path("/srv/a node's $HOME")
    ((path, (text, _)),) = scripts.filled("supervisor", Layout(state), tmp_path).items()
    assert path == tmp_path / "etc/supervisor/conf.d/instar.conf"
    read = configparser.RawConfigParser(inline_comment_prefixes=(";", "#"))  # as supervisor reads
    read.read_string(text)
    assert read.sections() == [f"program:instar-{role}" for role in LINES]
    for role in LINES:
        section = read[f"program:instar-{role}"]
        assert shlex.split(section["command"])[-4:] == ["launch", role, "--state", str(state)]
        assert section["stdout_logfile"] == f"{state}/run/{role}.log"
    (tmp_path / "etc/supervisord.d").mkdir(parents=True)
    assert list(scripts.filled("supervisor", Layout(state), tmp_path)) == [
        tmp_path / "etc/supervisord.d/instar.ini"
    ]


@pytest.mark.parametrize(
    ("manager", "path"),
    [
        ("systemd", "/a\nb"),
        ("sysv", "/a\tb"),
        ("supervisor", "/a #b"),
        ("supervisor", "/a;b"),
        ("supervisor", "/50%"),
    ],
)
def test_paths_that_a_manager_cannot_write_down(manager: str, path: str) -> None:
    with pytest.raises(InputError) as caught:
        scripts.check_path(manager, Path(path))
    assert caught.value.code == "bad-path"


@pytest.mark.parametrize("manager", ["systemd", "sysv", "openrc", "runit"])
def test_paths_that_it_can(manager: str) -> None:
    scripts.check_path(manager, ODD)


def machine_with(root: Path, first: str, *others: str) -> Path:
    for pid, name in enumerate((first, *others), 1):
        (root / f"proc/{pid}").mkdir(parents=True)
        (root / f"proc/{pid}/comm").write_text(f"{name}\n")
    (root / "etc/init.d").mkdir(parents=True)
    (root / "usr/sbin").mkdir(parents=True)
    for program in ("service", "sv", "supervisorctl"):
        (root / "usr/sbin" / program).touch()
    return root


@pytest.mark.parametrize(
    ("first", "others", "manager"),
    [
        ("init", (), "sysv"),
        ("init", ("supervisord",), "sysv"),
        ("runit", ("runsvdir",), "runit"),
        ("sh", ("runsvdir",), "runit"),
        ("tini", ("supervisord", "bash"), "supervisor"),
        ("supervisord", (), "supervisor"),
        ("bash", ("sshd",), "none"),
    ],
)
def test_what_the_machine_has(tmp_path: Path, first: str, others: tuple[str, ...], manager: str) -> None:
    assert scripts.found(machine_with(tmp_path, first, *others)) == manager


def test_what_the_machine_has_openrc(tmp_path: Path) -> None:
    root = machine_with(tmp_path, "init", "supervisord")
    (root / "run/openrc").mkdir(parents=True)
    (root / "run/openrc/softlevel").touch()
    assert scripts.found(root) == "openrc"


def test_sysv_needs_its_service_program(tmp_path: Path) -> None:
    root = machine_with(tmp_path, "init")
    (root / "usr/sbin/service").unlink()
    assert scripts.found(root) == "none"


@pytest.mark.parametrize("manager", ["sysv", "openrc", "runit", "supervisor"])
def test_files_of_another_node_are_seen(manager: str, tmp_path: Path) -> None:
    assert not scripts.installed(manager, tmp_path)
    for path, (text, _) in scripts.filled(manager, Layout(ODD), tmp_path).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert scripts.installed(manager, tmp_path)
