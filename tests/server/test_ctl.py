"""`instarctl` against a real server, as a person types it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from instar.core.errors import InputError
from instar_server.ctl.client import find_access
from instar_server.ctl.main import app
from instar_server.ctl.output import when
from instar_server.ctl.tokens import seconds
from tests.server.test_history import event, send
from tests.server.world import World


def ctl(world: World, *words: str, **environment: str) -> Result:
    env = {**world.access(), "COLUMNS": "200", **environment}
    return CliRunner().invoke(app, list(words), env=env)


def data(world: World, *words: str) -> Any:
    done = ctl(world, *words, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_a_walk(world: World, tmp_path: Path) -> None:
    """From a token to a node that is wanted to run something, and out again."""
    group = f"g{os.urandom(3).hex()}"
    made = data(world, "tokens", "create", "--group", group, "--uses", "2", "--lifetime", "2h")
    assert (made["uses"], made["group"]) == (2, group)
    listed = ctl(world, "tokens", "list")
    assert made["id"] in listed.stdout
    assert made["token"] not in listed.stdout
    node = world.new_node(group)
    assert [each["id"] for each in data(world, "nodes", "list", "--group", group)] == [node.id]
    assert ctl(world, "want", "--group", group, "--version", "1.1.0").exit_code == 0
    assert set(data(world, "nodes", "show", node.id)["wanted"]) == {"agent", "updater"}
    assert ctl(world, "unwant", "--group", group, "--line", "agent").exit_code == 0
    assert set(data(world, "nodes", "show", node.id)["wanted"]) == {"updater"}
    send(node, event("t1", 1, "reverted", reason={"code": "x", "text": "it hung"}))
    shown = ctl(world, "nodes", "history", node.id)
    assert "it hung" in shown.stdout
    out = tmp_path / "program.pyz"
    handed = ctl(world, "program", "download", "--token", made["token"], "--out", str(out))
    assert handed.exit_code == 0, handed.stderr
    assert out.stat().st_mode & 0o777 == 0o700
    assert ctl(world, "nodes", "revoke", node.id, "--why", "sold").exit_code == 0
    assert data(world, "nodes", "show", node.id)["state"] == "revoked"
    assert ctl(world, "tokens", "revoke", made["id"]).exit_code == 0
    assert {role["role"] for role in data(world, "trust", "status")} == {
        "root",
        "targets",
        "snapshot",
        "timestamp",
    }
    assert "1.1.0" in ctl(world, "releases", "list").stdout


@pytest.mark.parametrize(
    ("words", "status", "code"),
    [
        (["nodes", "show", "n-0000000000000000"], 6, "unknown-node"),
        (["nodes", "show", "nonsense"], 2, "bad-id"),
        (["want", "--group", "default", "--version", "9.9.9"], 6, "unknown-release"),
        (["want", "--version", "1.0.0"], 2, "bad-options"),
        (["tokens", "create", "--lifetime", "soon"], 2, "bad-time"),
        (["--token", "/nowhere", "nodes", "list"], 2, "no-token"),
        (["--server", "https://127.0.0.1:1", "nodes", "list"], 5, "unreachable"),
    ],
)
def test_a_refusal_is_one_line_and_a_status(world: World, words: list[str], status: int, code: str) -> None:
    done = ctl(world, *words)
    assert (done.exit_code, done.stdout) == (status, "")
    assert done.stderr.startswith("instarctl: cannot ")
    assert f"[{code}]" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_login_remembers_where_and_not_the_secret(world: World, tmp_path: Path) -> None:
    config = tmp_path / "c" / "instarctl.toml"
    words = ["--server", world.ports["api"], "--token", str(world.layout.admin_token)]
    words += ["--ca", str(world.layout.ca / "ca.pem")]
    empty = {
        "INSTARCTL_SERVER": "",
        "INSTARCTL_TOKEN_FILE": "",
        "INSTARCTL_CA": "",
        "INSTARCTL_CONFIG": str(config),
    }
    assert ctl(world, "login", *words, **empty).exit_code == 0
    assert world.admin not in config.read_text()
    done = ctl(world, "status", **empty)
    assert "is ready" in done.stdout, done.stderr


def test_access_is_put_together_from_what_is_given(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("secret\n")
    environment = {
        "INSTARCTL_CONFIG": str(tmp_path / "none"),
        "INSTARCTL_SERVER": "https://a:1/",
        "INSTARCTL_TOKEN": "x",
    }
    found = find_access(None, None, None, environment)
    assert (found.server, found.token) == ("https://a:1", "x")
    found = find_access("https://b:2", tmp_path / "t", None, environment)
    assert (found.server, found.token) == ("https://b:2", "secret")
    with pytest.raises(InputError, match="cannot find the server"):
        find_access("b:2", None, None, environment)


def test_times_in_words() -> None:
    assert [seconds(text) for text in ("90", "30m", "1.5h", "7d")] == [90, 1800, 5400, 604800]
    assert [when(moment, 1000.0) for moment in (None, 990.0, 1061.0, 1000.0 + 3 * 86400)] == [
        "never",
        "10 s ago",
        "in 1 min",
        "in 3 d",
    ]


def test_help_teaches_the_first_day() -> None:
    """Every command that the main help shows as an example is one, with options that it has."""
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).stdout
    examples = [line.split()[2:] for line in shown.splitlines() if line.strip().startswith("$ instarctl ")]
    assert [words[0] for words in examples] == [
        "login", "status", "release", "tokens", "program", "nodes", "want", "nodes", "job", "nodes",
    ]  # fmt: skip
    for words in examples:
        name = words[:2] if words[0] in ("release", "tokens", "program", "nodes", "job") else words[:1]
        own = CliRunner().invoke(app, [*name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert own.exit_code == 0, words
        for word in words:
            assert not word.startswith("--") or f"{word} " in own.stdout, words
