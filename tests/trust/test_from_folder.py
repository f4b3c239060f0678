"""`instar.pyz verify --from DIR`: a parcel's metadata are believed no more than a server's."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, Timestamp

from instar_lab import machine
from instar_server.trust import offline
from tests.trust.world import PATH, World, days, now, signed_part

NEWER = "node/instar-1.2.0.tar.gz"


class Parcels:
    """What is served now, put into folders; and the child that looks at one."""

    def __init__(self, world: World, pyz: Path, folder: Path) -> None:
        self.world, self.pyz, self.folder = world, pyz, folder
        self._count = 0

    def pack(self, changes: dict[str, bytes | None] | None = None) -> Path:
        self._count += 1
        folder = self.folder / f"parcel-{self._count}" / "metadata"
        folder.mkdir(parents=True)
        for name, data in {**self.world.served(), **(changes or {})}.items():
            if data is not None:
                (folder / name).write_bytes(data)
        return folder

    def verify(self, folder: Path, target: str = PATH, *words: str) -> dict[str, Any]:
        state = self.world.trust.parent
        command = [sys.executable, "-I", "-S", str(self.pyz), "verify", "--state", str(state)]
        done = subprocess.run(
            [*command, "--target", target, "--from", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        said: dict[str, Any] = json.loads(done.stdout)
        assert (done.returncode == 0) is said["ok"], done
        return said

    def refused(self, folder: Path, target: str = PATH) -> tuple[str, str]:
        """Code and kind; the node goes on from the same trusted metadata, or newer."""
        before = self.world.trusted()
        said = self.verify(folder, target)
        after = self.world.trusted()
        for name, data in before.items():
            assert signed_part(after[name])["version"] >= signed_part(data)["version"]
        return said["error"]["code"], said["kind"]


@pytest.fixture
def parcels(world: World, pyz: Path, tmp_path: Path) -> Parcels:
    return Parcels(world, pyz, tmp_path)


def test_a_target_is_described_without_any_server_or_identity(parcels: Parcels, world: World) -> None:
    for words in ((), ("--trust-only",)):
        said = parcels.verify(parcels.pack(), PATH, *words)
        release = world.repository.targets()[0]
        assert said["target"]["hashes"]["sha256"] == release.sha256
        assert said["target"]["custom"]["version"] == "1.1.0"
        assert said["versions"] == {"root": 1, "timestamp": 1, "snapshot": 1, "targets": 2}
    assert world.asked == []


def test_what_a_parcel_brought_is_kept_as_if_it_had_been_fetched(parcels: Parcels, world: World) -> None:
    old = parcels.pack()
    world.publish("1.2.0")
    assert parcels.verify(parcels.pack(), NEWER)["ok"]
    world.asked.clear()
    assert world.verify(NEWER).versions["timestamp"] == 2
    assert world.asked == ["metadata/2.root.json", "metadata/timestamp.json"]
    assert signed_part(world.trusted()["timestamp.json"])["version"] == 2
    # The parcel of before is older than what the node has, which decides by itself.
    said = parcels.verify(old)
    assert said["ok"]
    assert said["versions"]["timestamp"] == 2
    assert signed_part(world.trusted()["timestamp.json"])["version"] == 2


def test_an_older_parcel_brings_nothing_back_that_was_withdrawn(parcels: Parcels, world: World) -> None:
    old = parcels.pack()
    data = offline.remove_target(world.targets_bytes, PATH, days(90))
    world.repository.publish_targets(world.sign_targets(data), now())
    parcels.verify(parcels.pack())
    assert parcels.refused(old) == ("no-such-target", "absent")


def test_an_older_parcel_is_of_no_use_once_the_nodes_own_metadata_have_expired(
    parcels: Parcels, world: World
) -> None:
    """A freeze: neither what came nor what is here is signed for now."""
    old = parcels.pack()
    world.publish("1.2.0")
    _, data = world.current("timestamp")
    timestamp = Metadata[Timestamp].from_bytes(data)
    soon = now() + timedelta(seconds=2)
    timestamp.signed.expires = soon
    timestamp.sign(world.keys.timestamp)
    assert parcels.verify(parcels.pack({"timestamp.json": timestamp.to_bytes()}), NEWER)["ok"]
    machine.wait_for(lambda: now() > soon, "its expiry", 5.0, every_s=0.1)
    assert parcels.refused(old)[1] in ("stale", "expired")


def test_an_expired_parcel_is_refused(parcels: Parcels, world: World) -> None:
    _, data = world.current("timestamp")
    timestamp = Metadata[Timestamp].from_bytes(data)
    timestamp.signed.expires = now() - timedelta(days=1)
    timestamp.sign(world.keys.timestamp)
    folder = parcels.pack({"timestamp.json": timestamp.to_bytes()})
    assert parcels.refused(folder) == ("expired-timestamp", "expired")


@pytest.mark.parametrize("name", ["timestamp.json", "1.snapshot.json", "2.targets.json"])
def test_altered_metadata_are_refused(parcels: Parcels, world: World, name: str) -> None:
    body = json.loads(world.served()[name])
    body["signed"]["version"] += 1 if name == "timestamp.json" else 0
    body["signed"]["more"] = True
    folder = parcels.pack({name: json.dumps(body).encode()})
    code, kind = parcels.refused(folder)
    assert kind == "trust", code


def test_a_rotated_root_comes_along_in_the_parcel(parcels: Parcels, world: World) -> None:
    parcels.verify(parcels.pack())
    root = offline.next_root(world.root, world.keys.roles(), days(365))
    signed = world.sign_root(root, *world.keys.root[:2], old=world.root)
    world.repository.publish_root(signed, now())
    whole = parcels.pack()
    assert parcels.verify(whole)["versions"]["root"] == 2
    without = parcels.pack({"2.root.json": None})
    assert parcels.verify(without)["versions"]["root"] == 2, "the node has it by now"


def test_a_root_that_the_old_keys_did_not_sign_is_refused(
    parcels: Parcels, world: World, tmp_path: Path
) -> None:
    stranger = World(tmp_path / "stranger")
    try:
        root = offline.next_root(stranger.root, stranger.keys.roles(), days(365))
        folder = parcels.pack({"2.root.json": stranger.sign_root(root)})
        assert parcels.refused(folder)[1] == "trust"
    finally:
        stranger.repository.close()


@pytest.mark.parametrize("missing", ["timestamp.json", "1.snapshot.json", "2.targets.json"])
def test_a_parcel_that_lacks_something_is_waited_for(parcels: Parcels, missing: str) -> None:
    assert parcels.refused(parcels.pack({missing: None}))[1] in ("stale", "unreachable")


def test_wrong_words_change_nothing(parcels: Parcels, world: World, tmp_path: Path) -> None:
    before = world.trusted()
    assert parcels.refused(tmp_path / "absent") == ("no-metadata", "input")
    said = parcels.verify(parcels.pack(), PATH, "--server", "https://127.0.0.1:1")
    assert (said["error"]["code"], said["kind"]) == ("usage", "input")
    assert world.trusted() == before
