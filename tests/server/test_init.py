"""`instar-server init` that is refused leaves nothing of its own; wrong words are told in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from instar_server.main import app
from tests.server.world import Operator


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A folder with root.json and the online keys beside it."""
    folder = tmp_path / "keys"
    folder.mkdir()
    Operator(folder).make_root()
    return folder


def init(data: Path, root: Path, online: Path, *words: str) -> tuple[int, str]:
    """Exit status and what stands on stderr."""
    line = ["init", "--data", str(data), "--host", "localhost", "--root", str(root), "--online", str(online)]
    done = CliRunner().invoke(app, [*line, *words])
    return done.exit_code, done.stderr


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every folder (as b'')."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def wrong_root(good: Path) -> Path:
    """Its signatures are of another content."""
    path = good / "wrong.json"
    path.write_bytes((good / "root.json").read_bytes().replace(b'"version":1', b'"version":2'))
    assert path.read_bytes() != (good / "root.json").read_bytes()
    return path


def test_a_refused_root_leaves_nothing(good: Path, tmp_path: Path) -> None:
    data = tmp_path / "srv" / "data"
    status, said = init(data, wrong_root(good), good / "online")
    assert (status, len(said.splitlines())) == (3, 1), said
    assert not data.parent.exists()
    assert init(data, good / "root.json", good / "online")[0] == 0


def test_what_was_there_before_stays(good: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "online").mkdir(parents=True)
    for name in ("mine", "online/snapshot.key", "online/notes"):
        (data / name).write_text("mine")
    before = tree(data)
    assert init(data, wrong_root(good), good / "online")[0] == 3
    assert tree(data) == before


def test_what_fails_late_leaves_nothing_either(good: Path, tmp_path: Path) -> None:
    """Here the last file but one cannot be written: where it should come is a folder."""
    data = tmp_path / "data"
    (data / "admin.token").mkdir(parents=True)
    before = tree(data)
    status, said = init(data, good / "root.json", good / "online")
    assert status == 4, said
    assert len(said.splitlines()) == 1, said
    assert tree(data) == before


def test_online_keys_may_lie_in_place_already(good: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (good / "online").rename(data / "online")
    before = tree(data)
    assert init(data, wrong_root(good), data / "online")[0] == 3
    assert tree(data) == before
    assert init(data, good / "root.json", data / "online")[0] == 0


@pytest.mark.parametrize(
    ("words", "said", "see"),
    [
        (["run"], "missing option '--data'", " run"),
        (["run", "--data"], "option '--data' requires an argument", ""),
        (["run", "--data", "d", "--api-port", "x"], "invalid value for '--api-port'", " run"),
        (["run", "--data", "d", "--fast"], "no such option", " run"),
        (["init", "--data", "d"], "missing option '--host'", " init"),
        (["fly"], "no such command 'fly'", ""),
    ],
)
def test_wrong_words_are_told_in_one_line(words: list[str], said: str, see: str) -> None:
    done = CliRunner().invoke(app, words, prog_name="instar-server")
    assert (done.exit_code, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"instar-server: {said}"), done.stderr
    assert done.stderr.endswith(f"(see 'instar-server{see} --help')\n"), done.stderr


def test_help_is_as_long_as_ever_and_no_words_mean_help() -> None:
    for words, status in ((["--help"], 0), ([], 2), (["run", "--help"], 0), (["version"], 0)):
        done = CliRunner().invoke(app, words, prog_name="instar-server")
        assert (done.exit_code, done.stderr) == (status, ""), words
        assert words == ["version"] or "Usage: instar-server" in done.output
