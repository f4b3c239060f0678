"""What `instar` says: its help, one line for wrong usage, and refusals that name the way out."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from instar.cli import install, main
from instar.core import errors
from instar.core.quarantine import Entry
from instar.core.reason import Reason
from instar.core.settings import Settings, read_settings
from instar.host.records import Node as Enrolled
from instar.host.records import write_node, write_quarantine
from tests.node.world import Node


def called(*words: str) -> int:
    """The command line's exit status, also where the parser ends the program."""
    try:
        return main.main([*words])
    except SystemExit as end:
        return int(str(end.code))


def statuses() -> set[int]:
    return {kind.exit_status for kind in vars(errors).values() if isinstance(kind, type)} - {1}


def test_help_names_every_exit_status_and_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("--help") == 0
    said = capsys.readouterr().out
    named = said.rpartition("exit status: ")[2]
    assert [status for status in (0, *statuses()) if f"{status} " not in named] == []
    assert "7 the release is at fault" in named
    assert "\n    inspect " in said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("frob", "--json"), "instar: argument COMMAND: invalid choice: 'frob'"),
        ((), "instar: the following arguments are required: COMMAND"),
        (("status", "a\nb"), "instar: unrecognized arguments: a b (see instar --help)"),
        (("history", "--limit", "0"), "instar: argument --limit: expected a number of at least 1, got '0'"),
    ],
)
def test_wrong_usage_is_one_line(
    words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.endswith(" --help)\n")
    assert err.count("\n") == 1


def test_wrong_usage_of_a_command_names_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("history", "--limit", "0") == 2
    assert capsys.readouterr().err.endswith(" (see instar history --help)\n")


def test_inspect_is_the_entry_of_that_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("inspect", str(tmp_path / "none"), "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "no-program"
    assert called("inspect", str(tmp_path / "none")) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_clearing_what_is_not_in_quarantine(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.layout.identity.mkdir(parents=True, exist_ok=True)
    write_node(node.layout, Enrolled("n-1", "https://h:1", "default", 0.0))
    words = ("quarantine", "--clear", "9.9.9", "--state", str(node.layout.state))
    assert called(*words) == 2
    said = capsys.readouterr().err
    assert said == "instar: cannot clear 9.9.9: nothing is in quarantine (not-in-quarantine)\n"
    entry = Entry("1.1.0", Reason("crashed", "it crashed"), 1, 0.0, 1.0)
    write_quarantine(node.layout.quarantine, {"agent:a": entry, "updater:b": entry})
    assert called(*words) == 2
    assert "cannot clear 9.9.9: expected one of 1.1.0 (" in capsys.readouterr().err


# --- config.toml, as `instar install` writes it


def uncommented(text: str) -> str:
    lines = (
        line.removeprefix("# ") if "=" in line or line.startswith("#  ") else line
        for line in text.splitlines()
    )
    return "\n".join(lines)


def test_the_file_shows_every_setting_with_its_default() -> None:
    assert tomllib.loads(install.CONFIG) == {name: {} for name in tomllib.loads(install.CONFIG)}
    shown = tomllib.loads(uncommented(install.CONFIG))
    default = Settings()
    known = {
        f"{section}.{key}"
        for section in Settings.__dataclass_fields__
        for key in getattr(default, section).__dataclass_fields__
    }
    assert {f"{section}.{key}" for section in shown for key in shown[section]} == known
    assert read_settings(shown) == default


def test_the_file_says_what_a_change_of_os_needs() -> None:
    section = install.CONFIG.partition("[os]")[2]
    assert "after a change: instar stop, then instar start" in section
