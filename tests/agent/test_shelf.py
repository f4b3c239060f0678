"""The shelf: modules found by their digest and checked, or fetched by one child; services by their link."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from instar.agent.shelf import Shelf
from instar.core.errors import InputError, MachineError, ServerUnreachable, TrustError
from instar.host.layout import Layout
from tests.agent.shelving import World

NO = {"ok": False, "error": {"code": "no-such-target", "text": "cannot fetch: nobody signed it"}}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_found_by_version_and_digest(world: World) -> None:
    made = world.put("disk.usage", code="x = 1\n")
    found = world.shelf.find(*made)
    assert found is not None
    assert (found.manifest.name, found.digest) == ("disk.usage", made.digest)
    assert (found.folder / "main.py").read_text() == "x = 1\n"
    assert world.shelf.find(*made) is found  # nothing changed, so the files are not read again
    other = made.digest[:12] + "0" * 84  # the folder's name would do
    assert world.shelf.find("disk.usage", "1.0.0", other) is None
    assert world.shelf.find("disk.usage", "1.0.1", made.digest) is None
    assert world.shelf.find("disk.free", "1.0.0", made.digest) is None


@pytest.mark.parametrize(
    ("name", "version", "digest"),
    [
        ("../x", "1.0.0", "0" * 96),
        ("x", "one", "0" * 96),
        ("x", "1.0.0", "0" * 95),
        ("x", "1.0.0", "../" * 32),
    ],
)
def test_names_that_are_none(world: World, name: str, version: str, digest: str) -> None:
    with pytest.raises(InputError):
        world.shelf.find(name, version, digest)


def test_damage_is_noticed_also_after_it_was_good(world: World) -> None:
    made = world.put("disk.usage")
    found = world.shelf.find(*made)
    assert found is not None
    path = found.folder / "main.py"
    good, times = path.read_bytes(), path.stat()
    path.write_bytes(b"x" * len(good))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # somebody who covers his traces
    assert world.shelf.find(*made) is None
    path.write_bytes(good)
    assert world.shelf.find(*made) is not None
    (found.folder / "valid").unlink()
    assert world.shelf.find(*made) is None


def test_another_modules_manifest_is_refused(world: World) -> None:
    made = world.put("disk.usage")
    os.rename(world.layout.module("disk.usage").folder, world.layout.module("disk.free").folder)
    assert world.shelf.find("disk.free", "1.0.0", made.digest) is None


def test_services_are_what_current_points_to(world: World, tmp_path: Path) -> None:
    assert Shelf(Layout(tmp_path / "empty"), []).services() == {}
    for name, version in (("inventory", "1.0.0"), ("inventory", "1.1.0"), ("file.integrity", "1.0.0")):
        made = world.put(name, version, code=f"version = {version!r}\n", mode="service")
        place = world.layout.module(name)
        place.current.unlink(missing_ok=True)
        place.current.symlink_to(f"releases/{version}-{made.digest[:12]}")
    world.put("disk.usage")  # a one-shot: no link
    oneshot = world.put("once")
    world.layout.module("once").current.symlink_to(f"releases/1.0.0-{oneshot.digest[:12]}")
    (world.layout.modules / "Not A Module").mkdir()
    (world.layout.modules / "file").touch()
    found = world.shelf.services()
    assert {name: module.manifest.version for name, module in found.items()} == {
        "inventory": "1.1.0",
        "file.integrity": "1.0.0",
    }
    (found["inventory"].folder / "main.py").write_text("altered")
    assert set(world.shelf.services()) == {"file.integrity"}
    world.layout.module("file.integrity").current.unlink()
    assert world.shelf.services() == {}


def test_that_it_was_used_is_noted_once_an_hour(world: World) -> None:
    found = world.shelf.find(*world.put("disk.usage"))
    assert found is not None
    used, hour = world.layout.module("disk.usage").used, 3600
    world.shelf.mark_used(found)
    assert used.exists()
    for path in (used, found.folder):
        os.utime(path, (time.time() - hour / 2,) * 2)
    before = used.stat().st_mtime
    world.shelf.mark_used(found)
    assert used.stat().st_mtime == before
    os.utime(found.folder, (time.time() - 2 * hour,) * 2)
    world.shelf.mark_used(found)
    assert used.stat().st_mtime > before
    assert found.folder.stat().st_mtime > before
    assert world.shelf.find(*_names(found)) is found  # that is no change of the module


def _names(found: object) -> tuple[str, str, str]:
    return found.manifest.name, found.manifest.version, found.digest  # type: ignore[attr-defined]


# --- fetching


async def test_fetched_once_however_many_wait(world: World) -> None:
    made = world.offer("disk.usage")
    world.act({"bring": True, "sleep": 0.2})
    assert world.shelf.find(*made) is None
    found = await asyncio.gather(*(world.shelf.fetch(*made, made.target, 20) for _ in range(5)))
    assert {module.digest for module in found} == {made.digest}
    assert world.asked() == ["disk.usage"]
    assert world.shelf.find(*made) is not None


async def test_one_who_waits_no_longer_costs_the_others_nothing(world: World) -> None:
    made = world.offer("disk.usage")
    world.act({"bring": True, "sleep": 0.3})
    first, second = (asyncio.create_task(world.shelf.fetch(*made, made.target, 20)) for _ in range(2))
    await asyncio.sleep(0.05)
    first.cancel()
    assert (await second).digest == made.digest
    assert world.asked() == ["disk.usage"]


@pytest.mark.parametrize(
    ("step", "kind", "code"),
    [
        ({"say": {**NO, "kind": "absent"}}, MachineError, "no-such-target"),
        ({"say": {**NO, "kind": "trust"}}, TrustError, "no-such-target"),
        ({"say": {**NO, "kind": "unreachable"}}, ServerUnreachable, "no-such-target"),
        ({"say": {**NO, "kind": "stale"}}, ServerUnreachable, "no-such-target"),
        ({"exit": 3, "error": "Traceback: it fell"}, MachineError, "fetch-failed"),
        ({"kill": True}, MachineError, "fetch-killed"),
        ({"say": {"ok": False}}, MachineError, "fetch-failed"),
        ({"say": {"ok": True}}, MachineError, "not-fetched"),  # it lies
    ],
)
async def test_what_the_child_says_is_what_is_raised(
    world: World, step: dict[str, object], kind: type[Exception], code: str
) -> None:
    made = world.offer("disk.usage")
    world.act(step)
    for _ in range(2):  # it can be tried again
        with pytest.raises(kind) as caught:
            await world.shelf.fetch(*made, made.target, 20)
        assert caught.value.code == code  # type: ignore[attr-defined]
    assert world.asked() == ["disk.usage"] * 2


async def test_a_child_that_cannot_be_started(world: World) -> None:
    made = world.offer("disk.usage")
    with pytest.raises(MachineError, match="cannot fetch a module"):
        await Shelf(world.layout, ["/does/not/exist"]).fetch(*made, made.target, 20)
