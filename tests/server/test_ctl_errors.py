"""What `instarctl` says when it says no: one line on stderr, or with --json one document on stdout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from instar.core.errors import ReleaseError
from instar_server import VERSION
from instar_server.ctl.main import app
from instar_server.ctl.updater import finish
from instar_server.trust import offline
from tests.node.boot.test_disks import image
from tests.server.test_ctl import ctl
from tests.server.world import World, later

NODE = "n-0123456789abcdef"
DEAD = ["--server", "https://127.0.0.1:9", "--token", "TOKEN"]
UPDATER = ["--node", NODE, "--operator", "/nowhere"]


def said(tmp_path: Path, *words: str) -> Result:
    """Without any server, and without a login."""
    (tmp_path / "token").write_text("secret")
    environment = {"INSTARCTL_CONFIG": str(tmp_path / "none"), "COLUMNS": "80", "NO_COLOR": "1"}
    filled = [word.replace("TOKEN", str(tmp_path / "token")).replace("OUT", str(tmp_path)) for word in words]
    return CliRunner().invoke(app, filled, env=environment)


@pytest.mark.parametrize(
    ("words", "status", "code"),
    [
        ([*DEAD, "status"], 5, "unreachable"),
        ([*DEAD, "nodes", "list"], 5, "unreachable"),
        ([*DEAD, "want", "--group", "g", "--version", "1.0.0"], 5, "unreachable"),
        (["want", "--version", "1.0.0"], 2, "bad-options"),
        (["unwant"], 2, "bad-options"),
        (["tokens", "create", "--lifetime", "soon"], 2, "bad-time"),
        (["operator", "issue", "ada", "--out", "OUT/ada", "--lifetime", "soon"], 2, "bad-time"),
        ([*DEAD, "operator", "issue", "ada", "--out", "OUT/ada"], 5, "unreachable"),
        (["nodes", "update-os", NODE, "--within", "soon"], 2, "bad-time"),
        ([*DEAD, "nodes", "update-os", NODE, "--bundle", "b-1.0.0"], 5, "unreachable"),
        (["job", "run", "echo"], 2, "bad-options"),
        (["restart"], 2, "bad-options"),
        (["updater", "health", *UPDATER], 2, "bad-papers"),
        (["updater", "push", "none", *UPDATER], 2, "bad-papers"),
        (["updater", "update-os", *UPDATER], 2, "bad-papers"),
        ([*DEAD, "release", "current"], 5, "unreachable"),
        (["release", "pack", "OUT/none"], 2, "no-file"),
        (["release", "verify", "OUT/none", "--root", "OUT/none"], 2, "no-file"),
        (["keys", "show", "OUT/none"], 2, "no-file"),
        (["login"], 2, "bad-options"),
    ],
)
def test_an_error_is_one_line_or_one_document(
    tmp_path: Path, words: list[str], status: int, code: str
) -> None:
    done = said(tmp_path, *words)
    assert (done.exit_code, done.stdout) == (status, ""), done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("instarctl: cannot ")
    assert line.endswith(f" [{code}]")
    shown = said(tmp_path, *words, "--json")
    assert (shown.exit_code, shown.stderr) == (status, ""), shown.output
    error = json.loads(shown.stdout)["error"]
    assert (error["code"], line) == (code, f"instarctl: {error['text']} [{code}]")


@pytest.mark.parametrize(
    ("words", "what", "help_of"),
    [
        (["frobnicate"], "no such command 'frobnicate'", "instarctl"),
        (["nodes", "lst"], "no such command 'lst'", "instarctl nodes"),
        (["want", "--frob"], "no such option: --frob", "instarctl want"),
        (["want"], "missing option '--version'", "instarctl want"),
        (["job", "list", "--limit", "x"], "invalid value for '--limit'", "instarctl job list"),
        (["nodes", "show"], "missing argument", "instarctl nodes show"),
        (["nodes", "show", NODE, "more"], "got unexpected extra argument", "instarctl nodes show"),
        (["--frob", "status"], "no such option: --frob", "instarctl"),
    ],
)
def test_words_that_no_command_takes_are_one_line(
    tmp_path: Path, words: list[str], what: str, help_of: str
) -> None:
    done = said(tmp_path, *words)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"instarctl: {what}"), line
    assert line.endswith(f" (see '{help_of} --help')"), line
    shown = said(tmp_path, *words, "--json")
    assert (shown.exit_code, shown.stderr) == (2, ""), shown.output
    error = json.loads(shown.stdout)["error"]
    assert error["code"] == "bad-options"
    assert f"instarctl: {error['text']}" == line or "--json" in error["text"]


def test_help_is_shown_where_nothing_was_asked(tmp_path: Path) -> None:
    for words, status in (([], 2), (["nodes"], 2), (["--help"], 0), (["nodes", "list", "--help"], 0)):
        done = said(tmp_path, *words)
        assert (done.exit_code, done.stderr, "Usage: " in done.stdout) == (status, "", True), words


def test_a_prompt_that_is_broken_off_is_one_line(tmp_path: Path) -> None:
    done = said(tmp_path, "keys", "generate", "root-4", "--out", "OUT")
    assert done.exit_code == 1
    assert done.stderr.endswith("\ninstarctl: broken off\n")


@pytest.mark.parametrize(
    ("words", "expected", "got"),
    [
        (["nodes", "show", ""], "expected a node id such as n-0123456789abcdef", "''"),
        (["nodes", "revoke", ""], "as `instarctl nodes list` shows it", "''"),
        (["nodes", "history", "nope"], "expected a node id", "'nope'"),
        (["nodes", "move", "../groups", "--group", "g"], "expected a node id", "'../groups'"),
        (["node", "transfer", "N-0123456789abcdef"], "expected a node id", "'N-0123456789abcdef'"),
        (["node", "cancel-os", "nope"], "expected a node id", "'nope'"),
        (["want", "--node", "nope", "--version", "1.0.0"], "expected a node id", "'nope'"),
        (["job", "run", "echo", "--node", "nope"], "expected a node id", "'nope'"),
        (["job", "show", ""], "expected an order's id such as o-", "''"),
        (["job", "cancel", "o-1"], "as `instarctl job list` shows it", "'o-1'"),
        (["tokens", "revoke", ""], "as `instarctl tokens list` shows it", "''"),
        (["api-tokens", "revoke", "x"], "as `instarctl api-tokens list` shows it", "'x'"),
        (["release", "parcel", "", "--out", "OUT/p"], "expected a version such as 1.1.0", "''"),
        (["updater", "watch", "tx-none", *UPDATER], "expected a transaction's id such as tx-", "'tx-none'"),
        (["updater", "watch", "", *UPDATER], "as `instarctl updater transactions` shows it", "''"),
        (["updater", "health", "--node", ""], "expected a node id", "''"),
    ],
)
def test_an_id_is_looked_at_before_anybody_is_asked(
    tmp_path: Path, words: list[str], expected: str, got: str
) -> None:
    done = said(tmp_path, *DEAD, *words)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert expected in done.stderr
    assert done.stderr.endswith(f", got {got} [bad-id]\n"), done.stderr


def commands(command: Any, *names: str) -> Iterator[tuple[str, Any]]:
    """Every command that can be typed, without the groups."""
    if not hasattr(command, "commands"):
        yield " ".join(names), command
        return
    for name, below in command.commands.items():
        yield from commands(below, *names, name)


def test_every_command_takes_json(tmp_path: Path) -> None:
    found = dict(commands(typer.main.get_command(app)))
    assert len(found) > 50
    assert [
        name
        for name, command in found.items()
        if "--json" not in [word for option in command.params for word in option.opts]
    ] == []
    assert json.loads(said(tmp_path, "version", "--json").stdout) == {"version": VERSION}


def test_login_tells_as_json_what_it_wrote(world: World, tmp_path: Path) -> None:
    words = ["--server", world.ports["api"], "--token", str(world.layout.admin_token), "--json"]
    done = ctl(world, "login", *words, INSTARCTL_CONFIG=str(tmp_path / "c.toml"))
    told = json.loads(done.stdout)
    assert (told["path"], told["server"]) == (str(tmp_path / "c.toml"), world.ports["api"])


def test_main_help_tells_every_status(tmp_path: Path) -> None:
    shown = said(tmp_path, "--help").stdout
    for words in ("with 0", "with 1 (", "2 (", "3 (", "4 (", "5 (", "6 (", "with 7 ("):
        assert words in " ".join(shown.split()), words
    assert "--archive instar-1.0.0.tar.gz" in " ".join(shown.split())


# ---- what is shown all the same


def test_a_document_that_lacks_signatures_is_one_document(world: World, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(offline.first_targets(later(1)))
    (tmp_path / "root.json").write_bytes(world.operator.root)
    words = ["release", "verify", str(tmp_path / "t.json"), "--root", str(tmp_path / "root.json")]
    done = said(tmp_path, *words, "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["error"]["code"], found["missing"]) == (3, "wrong-threshold", 2)
    done = said(tmp_path, *words)
    assert (done.exit_code, "signed by 0 of the 2" in done.stdout) == (3, True)
    assert done.stderr.endswith(" [wrong-threshold]\n")


def test_a_release_that_went_back_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    reason = {"code": "fell-over", "text": "it fell over"}
    last = {"state": "reverted", "line": "agent", "from_version": "1.0.0", "reason": reason, "probes": None}
    with pytest.raises(typer.Exit) as ended:
        finish(last, as_json=True)
    assert ended.value.exit_code == ReleaseError.exit_status == 7
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert (found["state"], found["error"]["code"], shown.err) == ("reverted", "fell-over", "")
    with pytest.raises(typer.Exit):
        finish(last, as_json=False)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "instarctl: agent went back to 1.0.0: it fell over [fell-over]\n")


def test_no_bar_is_drawn_where_there_is_no_terminal(tmp_path: Path) -> None:
    root, kernel = tmp_path / "root", tmp_path / "kernel"
    root.write_bytes(bytes(range(256)) * 400)
    kernel.write_bytes(image({".linux": b"k" * 5000, ".initrd": b"i" * 5000, ".cmdline": b"quiet"}))
    words = ["bundle", "build", "--root", str(root), "--kernel", str(kernel), "--name", "web"]
    done = said(tmp_path, *words, "--version", "1.1.0", "--compatible", "board-7", "--out", "OUT/o")
    assert (done.exit_code, done.stderr) == (0, "")
