"""The node's command line against real daemons: an update of both lines, and everything that says no."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from instar.trust.embedded import read_embedded
from instar.trust.program import split_program
from tests.e2e.conftest import LINES, NEW, OLD, Stage, cli, code_of, command, said, settled, updates


def test_an_update_of_both_lines_and_the_way_back(stage: Stage) -> None:
    node = stage.node()
    nothing = cli(node, "rollback", "--json")
    assert (nothing.returncode, code_of(nothing)) == (2, "nothing-to-roll-back-to")
    stage.want(NEW)
    updates(node, NEW)

    status = json.loads(node.cli("status", "--json"))
    new = stage.hall.programs[NEW]
    for role in LINES:
        line = status["lines"][role]
        assert (line["current"], line["running"], line["digest"]) == (new.release, new.release, new.digest)
        assert line["answers"]
        assert not line["trial"]
    assert status["quarantine"] == []
    assert node.digests() == dict.fromkeys(LINES, new.digest)
    assert "nothing is in quarantine" in node.cli("quarantine")

    entries = node.history()
    assert [e["line"] for e in entries] == list(LINES)
    states = [change["state"] for change in entries[0]["changes"]]
    assert states == ["offered", "staged", "verified", "rehearsed", "trial", "confirming", "confirmed"]
    assert len(json.loads(node.cli("history", "--limit", "1", "--json"))["transactions"]) == 1

    back = json.loads(node.cli("rollback", "--json"))
    assert (back["line"], back["version"]) == ("agent", OLD)
    assert node.digests() == {"agent": stage.hall.programs[OLD].digest, "updater": new.digest}
    kept = json.loads(node.cli("quarantine", "--json"))["entries"]
    assert [(e["line"], e["version"], e["reason"]["code"]) for e in kept] == [("agent", NEW, "rolled-back")]
    assert NEW in node.cli("status").split("kept out")[1]

    said(node, "updater", "look")
    assert len(settled(node, 3)) == 3  # it stays away
    wrong = cli(node, "quarantine", "--clear", "9.9.9", "--json")
    assert (wrong.returncode, code_of(wrong)) == (2, "not-in-quarantine")
    assert json.loads(node.cli("quarantine", "--clear", NEW, "--json"))["cleared"] == 1
    updates(node, NEW, ("agent",), before=3)

    ended = cli(node, "stop")
    assert ended.stdout.strip() == "running: nothing"
    assert cli(node, "rollback", "--json").returncode == 4  # nobody to ask
    assert "not running" in node.cli("status")
    assert cli(node, "uninstall").returncode == 0
    assert not node.state.exists()
    assert node.running() == []


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("frobnicate",), 2),
        ((), 2),
        (("status", "--nonsense"), 2),
        (("history", "--limit", "0"), 2),
        (("history", "--limit", "many"), 2),
        (("rollback", "--line", "kernel"), 2),
        (("status", "--state", ""), 2),
        (("launch", "kernel", "--state", "/nowhere"), 2),
        (("guard",), 2),
        (("keep",), 2),
        (("agent", "--frob"), 2),
        (("status", "--state", "/nowhere/at/all"), 4),
        (("history", "--state", "/nowhere/at/all"), 4),
        (("start", "--state", "/nowhere/at/all"), 4),
        (("stop", "--state", "/nowhere/at/all"), 4),
        (("rollback", "--state", "/nowhere/at/all"), 4),
        (("quarantine", "--state", "/nowhere/at/all"), 4),
        (("agent", "--state", "/proc/nowhere"), 4),
        (("updater", "--state", "/proc/nowhere"), 4),
        (("launch", "agent", "--state", "/proc/nowhere"), 4),
        (("keep", "--state", "/proc/nowhere"), 4),
        (("uninstall", "--state", "/proc"), 2),
    ],
)
def test_what_cannot_be_done_says_so(bare: Path, words: tuple[str, ...], status: int) -> None:
    done = command(bare, *words)
    assert done.returncode == status, done
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr


def test_install_refuses_and_leaves_nothing(stage: Stage) -> None:
    good = stage.handed(uses=1)
    state = stage.folder / "s"

    def refused(program: Path, *more: str) -> tuple[int, str]:
        words = ("install", "--state", str(state), "--service", "none", "--json", "--wait", "0.5")
        done = command(program, *words, *more)
        assert done.returncode, done
        assert "Traceback" not in done.stderr
        return done.returncode, code_of(done)

    # Configurations that were changed on the way.
    program, comment = split_program(good.read_bytes())
    config, text, signature = read_embedded(good.read_bytes())
    forged = text.replace(config.server.encode(), b"https://127.0.0.1:1")
    parts = (base64.b64encode(forged), base64.b64encode(signature))
    for name, data, expected in (
        ("server", b".".join(parts), (3, "config-signature")),
        ("pk", comment[:-4] + b"PK==", (2, "bad-comment")),
        ("cut", comment[:-8], (2, "bad-comment")),
        ("none", b"", (2, "no-configuration")),
        ("dot", comment.replace(b".", b"!"), (2, "bad-comment")),
    ):
        path = stage.folder / f"{name}.pyz"
        path.write_bytes(program[:-2] + len(data).to_bytes(2, "little") + data)
        assert refused(path) == expected, name
        assert not state.exists()
    assert refused(good, "--pin", "0" * 64) == (3, "wrong-pin")
    assert not state.exists()

    # A token nobody knows (signed well, as by a server that forgot it): the server says no.
    stage.server.api.post("/groups", {"name": "other"})
    unknown = stage.handed(uses=1)
    for token in stage.server.api.get("/tokens")["tokens"]:
        if token["group"] == stage.group:
            stage.server.api.delete(f"/tokens/{token['id']}")
    assert refused(unknown)[0] == 6
    assert not state.exists()

    # A folder that holds something is not ours to use, nor to clear.
    state.mkdir()
    (state / "letter").write_text("dear")
    assert refused(stage.handed()) == (2, "not-empty")
    assert (state / "letter").read_text() == "dear"
    (state / "letter").unlink()

    # An empty one is; the second install is refused, and the node stays a node.
    once = stage.handed(uses=1)
    words = ("--service", "none", "--no-start", "--pin", config.fingerprint.upper(), "--json")
    done = command(once, "install", "--state", str(state), *words)
    assert done.returncode == 0, done
    assert refused(once) == (2, "already-installed")
    assert (state / "identity" / "node.json").exists()
    used_up = stage.folder / "t"
    state = used_up
    assert refused(once) == (6, "token-used-up")
    assert not used_up.exists()
    used_up.mkdir()
    assert refused(once) == (6, "token-used-up")
    assert list(used_up.iterdir()) == []


def test_an_uninstall_of_a_folder_that_is_no_node(bare: Path, tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "letter").write_text("dear")
    done = command(bare, "uninstall", "--state", str(folder), "--json")
    assert (done.returncode, code_of(done)) == (2, "not-installed")
    assert (folder / "letter").exists()
