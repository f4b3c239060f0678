"""Which server `instarctl` speaks to, and as whom: a command's own options, else those before its name, else the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import Result

from instar_server.trust import offline
from instar_server.trust.pack import pack_release
from tests.server.test_ctl import ctl
from tests.server.world import World, later, program

DEAD = "https://127.0.0.1:9"
UNSET = {"INSTARCTL_SERVER": "", "INSTARCTL_TOKEN_FILE": "", "INSTARCTL_TOKEN": "", "INSTARCTL_CA": ""}


@pytest.fixture
def login(world: World, tmp_path: Path) -> dict[str, str]:
    """The environment of somebody who has logged in as admin."""
    environment = {**UNSET, "INSTARCTL_CONFIG": str(tmp_path / "instarctl.toml")}
    words = ["--server", world.ports["api"], "--token", str(world.layout.admin_token)]
    done = ctl(world, "login", *words, "--ca", str(world.layout.ca / "ca.pem"), **environment)
    assert done.exit_code == 0, done.stderr
    return environment


@pytest.fixture
def signed(world: World, tmp_path: Path) -> list[str]:
    """The words that publish a release; it is signed, and would be taken."""
    release = pack_release(program("7.7.7"), "7.7.7")
    data = offline.add_target(
        world.operator.targets, release.path, len(release.archive), release.sha256, release.custom, later(90)
    )
    for key in world.operator.targets_keys[:2]:
        data = offline.sign(data, key, [world.operator.root])
    document, archive = tmp_path / "next.json", tmp_path / "instar-7.7.7.tar.gz"
    document.write_bytes(data)
    archive.write_bytes(release.archive)
    return ["release", "publish", str(document), "--archive", str(archive)]


def published(world: World) -> list[str]:
    return [release["version"] for release in world.ask("GET", "/releases")["releases"]]


def test_publish_goes_to_no_other_server_than_the_one_that_was_named(
    world: World, login: dict[str, str], signed: list[str]
) -> None:
    done = ctl(world, "--server", DEAD, *signed, **login)
    assert (done.exit_code, "[unreachable]" in done.stderr) == (5, True), done.output
    assert "7.7.7" not in published(world)


def test_publish_asks_with_the_token_that_was_named(
    world: World, login: dict[str, str], signed: list[str], tmp_path: Path
) -> None:
    viewer = tmp_path / "viewer"
    viewer.write_text(world.ask("POST", "/api-tokens", 201, json={"role": "viewer"})["token"])
    done = ctl(world, "--token", str(viewer), *signed, **login)
    assert (done.exit_code, done.stdout) == (6, ""), done.output
    assert "7.7.7" not in published(world)


def test_the_authority_that_was_named_is_the_one_that_counts(
    world: World, login: dict[str, str], signed: list[str], tmp_path: Path
) -> None:
    (tmp_path / "none.pem").write_text("no certificate")
    done = ctl(world, "--ca", str(tmp_path / "none.pem"), *signed, **login)
    assert (done.exit_code, "[bad-ca]" in done.stderr) == (2, True), done.output


def asked(world: World, login: dict[str, str], folder: Path, *words: str) -> Result:
    return ctl(world, *[word.replace("OUT", str(folder)) for word in words], **login)


@pytest.mark.parametrize(
    "words",
    [
        ["release", "current", "--out", "OUT"],
        ["release", "parcel", "1.0.0", "--out", "OUT/p"],
        ["operator", "issue", "ada", "--out", "OUT/ada"],
        ["program", "download", "--token", "x", "--out", "OUT/pyz"],
        ["tokens", "create"],
        ["job", "list"],
        ["nodes", "system", "n-0123456789abcdef"],
    ],
)
def test_the_server_before_the_command_holds_for_every_command(
    world: World, login: dict[str, str], tmp_path: Path, words: list[str]
) -> None:
    (tmp_path / "out").mkdir()
    done = asked(world, login, tmp_path / "out", "--server", DEAD, *words)
    assert (done.exit_code, "[unreachable]" in done.stderr) == (5, True), done.output
    done = asked(world, login, tmp_path / "out", "--server", "", *words)
    assert (done.exit_code, "[no-server]" in done.stderr) == (2, True), done.output


def test_a_commands_own_options_go_first(world: World, login: dict[str, str], tmp_path: Path) -> None:
    words = ["release", "current", "--out", str(tmp_path), "--server", world.ports["api"]]
    done = ctl(world, "--server", DEAD, *words, **login)
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "targets.json").exists()


def test_login_takes_what_stands_before_it(world: World, tmp_path: Path) -> None:
    environment = {**UNSET, "INSTARCTL_CONFIG": str(tmp_path / "c.toml")}
    words = ["--server", world.ports["api"], "--token", str(world.layout.admin_token)]
    assert ctl(world, *words, "login", **environment).exit_code == 0
    assert world.ports["api"] in (tmp_path / "c.toml").read_text()
    done = ctl(world, "login", **environment)
    assert (done.exit_code, "[bad-options]" in done.stderr) == (2, True)
