"""Parcels on the server's disk: made once, by a thread of their own, and only as often as their bytes ask for it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instar.core.errors import InstarError, MachineError
from instar_server.services.parcel_folder import consistent
from instar_server.services.parcels import Parcels
from instar_server.trust import offline
from tests.server import taking
from tests.server.test_channel import alive, eventually
from tests.server.test_transfers import own_world, sending, want
from tests.server.world import Node, World, running
from tests.trust.world import World as Repositories
from tests.trust.world import days, now

__all__ = ["sending"]  # a fixture


@pytest.fixture
async def node(sending: World) -> Node:
    return await asyncio.to_thread(sending.new_node, f"g{os.urandom(4).hex()}")


# ---- many at once


@contextlib.contextmanager
def slow_to_open(path: Path) -> Iterator[int]:
    """A lease on a file, whose descriptor is given: who opens the file waits in the kernel until the block ends."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    fd = os.open(path, os.O_RDWR)
    try:
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            pytest.skip(f"no leases here: {error}")
        yield fd
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, before)


def is_waited_for(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_WRLCK


async def test_metadata_are_fetched_while_64_nodes_wait_for_one_parcel(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async with own_world(tmp_path_factory, ping_s=30.0, wrong_tokens=1000) as world:
        release = await asyncio.to_thread(world.publish, "1.1.0", 1000)
        nodes = [await asyncio.to_thread(world.new_node) for _ in range(64)]
        folder, _, name = release.path.rpartition("/")
        archive = world.layout.trust / "targets" / folder / f"{release.sha256}.{name}"
        async with contextlib.AsyncExitStack() as stack:
            channels = [await stack.enter_async_context(each.connected()) for each in nodes]
            with slow_to_open(archive) as lease:
                await asyncio.to_thread(world.want, "group", "default", "1.1.0", via="native")
                await eventually(lambda: is_waited_for(lease))
                views = [taking.state(world, each.id, "queued") for each in nodes]
                await asyncio.gather(*views)  # all have asked for it
                for each in nodes[:4]:
                    assert await asyncio.to_thread(fetch_metadata, each) == [200] * 4
                assert await alive(channels[0])
                assert is_waited_for(lease)  # all the time
            offers = await asyncio.gather(*(taking.offer(channel, 30.0) for channel in channels))
        assert len({each["sha384"] for each in offers}) == 1
        assert len(list(world.layout.parcels.iterdir())) == 2


def fetch_metadata(node: Node) -> list[int]:
    names = ("timestamp.json", "1.snapshot.json", "2.targets.json", "1.root.json")
    with node.http() as http:
        return [http.get(f"/v1/metadata/{name}", timeout=15.0).status_code for name in names]


def published(repositories: Repositories, size: int, *targets: str) -> None:
    """Targets of so many bytes, all the same ones."""
    digest = repositories.add_blob(os.urandom(1 << 20) * (size >> 20))
    custom = {"kind": "node", "version": "1.0.0", "program_digest": "ab" * 48}
    data = repositories.targets_bytes
    for target in targets:
        data = offline.add_target(data, target, size, digest, custom, days(90))
    repositories.repository.publish_targets(repositories.sign_targets(data), now())


async def test_who_asks_for_the_same_shares_its_place_and_places_are_few(tmp_path: Path) -> None:
    repositories = Repositories(tmp_path)
    targets = [f"node/{n}.tar.gz" for n in range(66)]
    published(repositories, 1 << 20, *targets)
    parcels = Parcels(repositories.repository, tmp_path / "parcels")
    found = await asyncio.gather(*(parcels.parcel_of(targets[0]) for _ in range(200)))
    assert len({parcel.path for parcel in found}) == 1
    answers = await asyncio.gather(*map(parcels.parcel_of, targets), return_exceptions=True)
    assert [getattr(each, "code", "") for each in answers] == [""] * 64 + ["too-many-parcels"] * 2
    assert (await parcels.parcel_of(targets[-1])).target == targets[-1]
    await parcels.close()


# ---- what a node says of one


async def say_altered(world: World, node: Node) -> dict[str, Any]:
    """Take an offer, and say that what came was altered."""
    async with node.connected() as channel:
        await want(node)
        offered = await taking.offer(channel)
        said = {"state": "failed", "code": "altered-parcel", "text": "not what was announced"}
        await channel.send("update-state", id=offered["id"], **said)
        assert (await taking.state(world, node.id, "failed"))["code"] == "altered-parcel"
        return offered


def record(world: World, offered: dict[str, Any]) -> Path:
    """The file that was written when the parcel of this offer was made."""
    files = world.layout.parcels.glob("*.json")
    return next(path for path in files if json.loads(path.read_bytes())["sha384"] == offered["sha384"])


async def test_a_node_alone_does_not_have_a_parcel_made_again(sending: World, node: Node) -> None:
    first = await say_altered(sending, node)
    made = record(sending, first).stat().st_mtime_ns
    other = await asyncio.to_thread(sending.new_node)
    async with other.connected() as channel:
        await want(other)
        taken = await taking.take(channel)
    assert taken.offer["sha384"] == first["sha384"]
    assert record(sending, first).stat().st_mtime_ns == made


async def test_one_that_was_altered_on_the_disk_is_made_again(sending: World, node: Node) -> None:
    async with node.connected() as channel:
        await want(node)
        offered = await taking.offer(channel)
    path = record(sending, offered).with_suffix(".tar")
    with path.open("r+b") as file:
        file.seek(-20_000, os.SEEK_END)
        file.write(b"rot")
    other = await asyncio.to_thread(sending.new_node)
    assert (await say_altered(sending, other))["sha384"] == offered["sha384"]
    await eventually(lambda: not path.exists() or intact(path, offered))
    third = await asyncio.to_thread(sending.new_node)
    async with third.connected() as channel:
        await want(third)
        await taking.take(channel)  # checks what comes
    assert intact(path, offered)


def intact(path: Path, offered: dict[str, Any]) -> bool:
    return hashlib.sha384(path.read_bytes()).hexdigest() == str(offered["sha384"])


async def test_none_is_made_of_a_file_that_was_altered_in_the_repository(tmp_path: Path) -> None:
    """It would be sent again and again, and still when the file is right again."""
    repositories, target = Repositories(tmp_path), "node/one.tar.gz"
    published(repositories, 1 << 20, target)
    (record,) = repositories.repository.targets()
    archive = repositories.repository.target_file(consistent(record))
    assert archive is not None
    parcels, good = Parcels(repositories.repository, tmp_path / "parcels"), archive.read_bytes()
    archive.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    for ask in (parcels.parcel_of, parcels.archive_sha384):
        with pytest.raises(MachineError) as refused:
            await ask(target)
        assert refused.value.code == "altered-blob"
    assert list((tmp_path / "parcels").iterdir()) == []
    archive.write_bytes(good)
    assert (await parcels.parcel_of(target)).target == target
    assert await parcels.archive_sha384(target) == hashlib.sha384(good).hexdigest()
    await parcels.close()


# ---- the disk


def test_no_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    with running(tmp_path, wrong_tokens=1000) as world:
        release = world.publish("1.0.0", 400_000)
        world.layout.parcels.mkdir(exist_ok=True)
        small = ["mount", "-t", "tmpfs", "-o", "size=256k", "instar-parcels", str(world.layout.parcels)]
        done = subprocess.run(small, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no mounts here: {done.stderr}")
        try:
            error = world.ask("GET", "/releases/1.0.0/parcel", 503)["error"]
            left = list(world.layout.parcels.iterdir())
        finally:
            subprocess.run(["umount", str(world.layout.parcels)], check=True)
        assert (error["code"], left) == ("disk-full", [])
        found = re.search(r"expected (\d+) bytes free in (\S+), got (\d+)", error["message"])
        assert found is not None, error
        needed, free = int(found[1]), int(found[3])
        assert free <= 256 * 1024 < len(release.archive) < needed
        assert found[2] == str(world.layout.parcels)
        with world.api() as api:
            assert len(api.get("/releases/1.0.0/parcel").content) == needed


def test_a_new_timestamp_ends_those_of_the_old_one(tmp_path: Path) -> None:
    with running(tmp_path, wrong_tokens=1000) as world, world.api() as api:

        def sha384(version: str) -> str:
            return str(api.get(f"/releases/{version}/parcel").raise_for_status().headers["Instar-SHA384"])

        def kept() -> set[str]:
            files = world.layout.parcels.glob("*.json")
            assert len(list(world.layout.parcels.glob("*.tar"))) == len(
                list(world.layout.parcels.glob("*.json"))
            )
            return {json.loads(path.read_bytes())["sha384"] for path in files}

        world.publish("1.0.0")
        world.publish("1.1.0")
        first, second = sha384("1.0.0"), sha384("1.1.0")
        for path in world.layout.parcels.glob("*.tar"):  # an hour passes; the second is then used
            os.utime(path, (time.time() - 3600,) * 2)
        assert sha384("1.1.0") == second
        world.publish("1.2.0")
        third = sha384("1.2.0")
        assert kept() == {second, third}, "somebody may just be about to open the second"
        for path in world.layout.parcels.glob("*.tar"):
            os.utime(path, (time.time() - 3600,) * 2)
        fourth = sha384("1.0.0")
        assert kept() == {third, fourth}, "of these metadata, so it may be asked for again"
        assert first not in kept()


def test_a_parcel_for_operators(sending: World) -> None:
    with sending.api() as api:
        answer = api.get("/releases/1.1.0/parcel")
        again = api.get("/releases/1.1.0/parcel")
        viewer = api.post("/api-tokens", json={"role": "viewer"}).json()["token"]
    assert answer.headers["Instar-SHA384"] == hashlib.sha384(answer.content).hexdigest()
    assert again.content == answer.content
    assert taking.Taken({}, answer.content).said["version"] == "1.1.0"
    assert sending.ask("GET", "/releases/9.9.9/parcel", 404)["error"]["code"] == "no-release"
    assert sending.ask("GET", "/releases/1.1.0/parcel?kind=recovery", 404)["error"]["code"] == "no-release"
    with sending.api(viewer) as api:
        assert api.get("/releases/1.1.0/parcel").status_code == 403


def test_parcels_are_made_once_and_few_are_kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("parcels"), wrong_tokens=1000) as world:
        folder = world.layout.parcels
        for n in range(22):
            world.publish(f"1.{n}.0")
            with world.api() as api:
                first = api.get(f"/releases/1.{n}.0/parcel")
                assert api.get(f"/releases/1.{n}.0/parcel").content == first.content
        assert len(list(folder.glob("*.tar"))) == len(list(folder.glob("*.json"))) == 20
        # A half one, and one that has lost its length, are made anew.
        newest = max(folder.glob("*.tar"), key=lambda path: path.stat().st_mtime)
        os.truncate(newest, 100)
        with world.api() as api:
            assert api.get("/releases/1.21.0/parcel").content == first.content
        assert not list(folder.glob(".*"))


# ---- the end


async def test_making_ends_with_the_server(tmp_path: Path) -> None:
    """It is not waited for, and leaves nothing."""
    repositories, target = Repositories(tmp_path), "node/large.tar.gz"
    published(repositories, 96 << 20, target)
    parcels = Parcels(repositories.repository, tmp_path / "parcels")
    waiting: list[asyncio.Task[Any]] = [asyncio.create_task(parcels.parcel_of(target)) for _ in range(2)]
    waiting.append(asyncio.create_task(parcels.archive_sha384(target)))  # behind it
    async with asyncio.timeout(60):
        while not any(path.stat().st_size for path in (tmp_path / "parcels").glob(".*.new")):
            await asyncio.sleep(0.001)
    await parcels.close()
    codes = [error.code for error in await asyncio.gather(*waiting, return_exceptions=True)
             if isinstance(error, InstarError)]  # fmt: skip
    assert codes == ["stopped"] * 3
    assert list((tmp_path / "parcels").iterdir()) == []
    with pytest.raises(InstarError, match="stopping"):
        await parcels.parcel_of(target)
