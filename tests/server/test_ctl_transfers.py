"""`instarctl` for native updates, recoveries and parcels."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from instar_server.ctl.main import app
from instar_server.trust.pack import pack_recovery, release_of
from tests.server import taking
from tests.server.following import Following
from tests.server.test_ctl import ctl, data
from tests.server.world import World, program, running


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("ctl"), ping_s=30.0, wrong_tokens=1000) as world:
        world.publish("1.0.0")
        world.publish("1.1.0")
        world.publish_core("1.1.0")
        yield world


def core(main: bytes = b"import instar.rescue.main", version: str = "2.3.4") -> bytes:
    """A zipapp as `instar-lab build --recovery` makes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("__main__.py"), main)
        if version:
            archive.writestr(zipfile.ZipInfo("instar/version.py"), f'VERSION = "{version}"\n')
    return b"#!/usr/bin/env python3\n" + file.getvalue()


def test_a_wish_has_a_way(own: World) -> None:
    group = f"g{os.urandom(3).hex()}"
    own.new_node(group)
    (updater, agent) = data(own, "want", "--group", group, "--version", "1.1.0", "--via", "native")
    assert (updater["via"], agent["via"]) == ("native", "native")
    assert "native" in ctl(own, "wishes").stdout
    (only,) = data(own, "want", "--group", group, "--version", "1.1.0", "--line", "agent")
    assert only["via"] == "pull"
    done = ctl(own, "want", "--group", group, "--version", "1.1.0", "--via", "pigeon")
    assert done.exit_code == 2


async def test_a_transfer_is_watched(own: World) -> None:
    node = await asyncio.to_thread(own.new_node)
    assert (await asyncio.to_thread(data, own, "node", "transfer", node.id))["state"] == "none"
    async with node.connected() as channel:
        await asyncio.to_thread(own.want, "node", node.id, "1.1.0", via="native")
        offered = await taking.offer(channel)
        watching = Following(own, "node", "transfer", node.id, "--watch")
        await watching.until_said("agent 1.1.0: offered")
        await taking.take(channel, offered)
        done = await watching.done()
    assert done.exit_code == 0, done.stderr
    assert "agent 1.1.0: received 100 %" in done.stderr
    assert "1.1.0" in done.stdout


@pytest.mark.parametrize(("ok", "status", "state"), [(True, 0, "done"), (False, 1, "failed")])
async def test_a_recovery_is_waited_for(own: World, ok: bool, status: int, state: str) -> None:
    node = await asyncio.to_thread(own.new_node)
    async with node.connected() as channel:
        words = ("node", "recover", node.id, "--version", "1.0.0", "--line", "agent", "--wait", "--json")
        waiting = asyncio.create_task(asyncio.to_thread(ctl, own, *words))
        await taking.take(channel)
        told = await channel.read_type("agentupdate")
        assert (told["version"], told["lines"]) == ("1.0.0", ["agent"])
        await channel.send("agentupdate-progress", id=told["id"], phase="fetch", percent=50)
        await channel.send("agentupdate-ended", id=told["id"], ok=ok, code="" if ok else "bad-hash")
        done = await waiting
    assert done.exit_code == status, done.stderr
    view: dict[str, Any] = json.loads(done.stdout)
    assert (view["state"], view["core"], view["version"]) == (state, "1.1.0", "1.0.0")


def test_a_node_that_is_away_cannot_be_recovered(own: World) -> None:
    done = ctl(own, "node", "recover", own.new_node().id)
    assert (done.exit_code, "[not-connected]" in done.stderr) == (6, True)


def test_a_parcel_is_fetched(own: World, tmp_path: Path) -> None:
    out = tmp_path / "p"
    for version, more in (("1.0.0", ()), ("1.1.0", ("--recovery",))):
        done = ctl(own, "release", "parcel", version, "--out", str(out), *more, "--json")
        assert done.exit_code == 0, done.output
        said = json.loads(done.stdout)
        assert said["sha384"] == hashlib.sha384(out.read_bytes()).hexdigest()
        assert taking.Taken({}, out.read_bytes()).said["version"] == version
    refused = ctl(own, "release", "parcel", "9.9.9", "--out", str(out))
    assert (refused.exit_code, "no-release" in refused.stderr) == (6, True)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
    assert "recovery/core-1.1.0.pyz" in ctl(own, "releases", "list").stdout


def test_a_core_is_added_by_its_file(own: World, tmp_path: Path) -> None:
    (tmp_path / "targets.json").write_bytes(own.operator.targets)
    file = tmp_path / "instar-recovery.pyz"
    file.write_bytes(core())
    words = ("--targets", str(tmp_path / "targets.json"), "--out", str(tmp_path / "next.json"), "--json")
    done = CliRunner().invoke(app, ["release", "add", str(file), *words])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["target"] == "recovery/core-2.3.4.pyz"
    signed = json.loads((tmp_path / "next.json").read_bytes())["signed"]["targets"]
    assert signed["recovery/core-2.3.4.pyz"]["custom"] == {
        "kind": "recovery", "version": "2.3.4", "digest": hashlib.sha384(core()[:-2]).hexdigest(),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("data", "name", "code"),
    [
        (program("1.0.0"), "instar.pyz", "bad-release"),
        (core(version=""), "instar-recovery.pyz", "bad-version"),
        (core(version="new"), "instar-recovery.pyz", "bad-version"),
        (core() [:-2] + b"\x01\x00x", "instar-recovery.pyz", "bad-release"),
        (b"#!/bin/sh\n", "instar-recovery.pyz", "bad-release"),
    ],
)  # fmt: skip
def test_what_is_no_core_is_refused(data: bytes, name: str, code: str) -> None:
    from instar.core.errors import InputError

    with pytest.raises(InputError) as refusal:
        release_of(data, name)
    assert refusal.value.code == code


def test_a_core_may_have_its_version_in_its_name() -> None:
    release = release_of(program("x"), "core-1.2.3.pyz")
    assert release == pack_recovery(program("x"), "1.2.3")
    assert (release.path, release.digest) == ("recovery/core-1.2.3.pyz", release.custom["digest"])
