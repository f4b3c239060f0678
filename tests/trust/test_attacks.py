"""Attacks on the metadata: each refused, named, and without harm to what the node trusts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
from securesystemslib.signer import Signature
from tuf.api.metadata import Metadata, MetaFile, Snapshot, Timestamp

from instar.core.errors import InstarError, ServerRefused, ServerUnreachable, TrustError
from instar.oneshot.verify import kind_of
from instar_server.trust import offline
from tests.trust.world import PATH, World, days, now, sha256, signed_part, signer


@contextmanager
def refused(world: World, code: str, *words: str, kind: str = "trust") -> Iterator[None]:
    """What runs inside is refused so, and the node goes on from the same trusted metadata afterwards."""
    before = world.trusted()
    with pytest.raises(InstarError) as caught:
        yield
    assert caught.value.code == code
    for word in words:
        assert word in caught.value.text, (word, caught.value.text)
    assert kind_of(caught.value) == kind
    after = world.trusted()
    for name, data in before.items():
        old, new = signed_part(data)["version"], signed_part(after[name])["version"]
        assert new >= old, name
    world.tamper.clear()
    world.unreachable = False


def test_a_signed_target_is_described(world: World) -> None:
    release = world.repository.targets()[0]
    found = world.verify()
    assert (found.path, found.length, found.sha256) == (PATH, release.length, release.sha256)
    assert found.url_path == f"targets/node/{release.sha256}.instar-1.1.0.tar.gz"
    assert found.custom["version"] == "1.1.0"
    assert found.versions == {"root": 1, "timestamp": 1, "snapshot": 1, "targets": 2}
    blob = world.repository.target_file(found.url_path.removeprefix("targets/"))
    assert blob is not None
    assert sha256(blob.read_bytes()) == found.sha256
    assert not (world.trust / "scratch").exists()


def test_a_second_look_fetches_only_what_may_be_new(world: World) -> None:
    world.verify()
    world.asked.clear()
    world.verify()
    assert world.asked == ["metadata/2.root.json", "metadata/timestamp.json"]


def test_replayed_timestamp_is_called_a_stale_mirror(world: World) -> None:
    old = world.served()
    world.publish("1.2.0")
    world.verify()
    world.tamper = dict(old)
    with refused(world, "stale-mirror", "timestamp version 2 or later, got 1", "waiting", kind="stale"):
        world.verify()
    assert world.verify("node/instar-1.2.0.tar.gz").versions["timestamp"] == 2


def test_snapshot_that_the_mirror_lacks_is_waited_for(world: World) -> None:
    world.verify()
    world.publish("1.2.0")
    name, _ = world.current("snapshot")
    world.tamper[name] = None
    with refused(world, "stale-mirror", "snapshot version 2", kind="stale"):
        world.verify()
    assert world.verify("node/instar-1.2.0.tar.gz").versions["snapshot"] == 2


def test_new_timestamp_that_goes_back_to_an_old_snapshot(world: World) -> None:
    old = world.served()
    world.publish("1.2.0")
    world.verify()
    snapshot = old["1.snapshot.json"]
    timestamp = Metadata(Timestamp(version=9, expires=days(1), snapshot_meta=MetaFile(1, len(snapshot))))
    timestamp.sign(world.keys.timestamp)
    world.tamper = {"timestamp.json": timestamp.to_bytes()}
    with refused(world, "rolled-back", "timestamp version 9", "snapshot version must be >= 2"):
        world.verify()


def test_new_snapshot_that_goes_back_to_old_targets(world: World) -> None:
    world.publish("1.2.0")
    world.verify()
    snapshot = Metadata(Snapshot(version=9, expires=days(1), meta={"targets.json": MetaFile(2)}))
    snapshot.sign(world.keys.snapshot)
    timestamp = Metadata(Timestamp(version=9, expires=days(1), snapshot_meta=MetaFile(9)))
    timestamp.sign(world.keys.timestamp)
    world.tamper = {"timestamp.json": timestamp.to_bytes(), "9.snapshot.json": snapshot.to_bytes()}
    with refused(world, "rolled-back", "snapshot version 9"):
        world.verify()


def test_frozen_timestamp(world: World) -> None:
    timestamp = Metadata[Timestamp].from_bytes(world.current("timestamp")[1])
    timestamp.signed.version, timestamp.signed.expires = 2, now() - timedelta(hours=1)
    timestamp.sign(world.keys.timestamp)
    world.verify()
    world.tamper = {"timestamp.json": timestamp.to_bytes()}
    with refused(world, "expired-timestamp", "timestamp metadata version 2", "clock says", kind="expired"):
        world.verify()
    world.verify()


def test_timestamp_that_expires_while_the_server_repeats_it(world: World) -> None:
    """The node holds the very timestamp that the mirror keeps on serving; only time has passed."""
    world.verify()
    timestamp = Metadata[Timestamp].from_bytes(world.current("timestamp")[1])
    timestamp.signed.expires = now() - timedelta(seconds=5)
    timestamp.sign(world.keys.timestamp)
    (world.trust / "tuf" / "timestamp.json").write_bytes(timestamp.to_bytes())
    world.tamper = {"timestamp.json": timestamp.to_bytes()}
    with refused(world, "expired-timestamp", "timestamp metadata version 1 expired", kind="expired"):
        world.verify()


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_mixed_snapshot(world: World, role: str) -> None:
    """New metadata above, an older file of one role below it."""
    world.verify()
    older_name, older = world.current(role)
    world.publish("1.2.0")
    newer_name, _ = world.current(role)
    assert newer_name != older_name
    world.tamper = {newer_name: older}
    wanted, got = newer_name.split(".")[0], older_name.split(".")[0]
    with refused(world, "mixed-snapshot", f"{role} metadata", f"version {wanted}", f"got version {got}"):
        world.verify()
    world.verify("node/instar-1.2.0.tar.gz")


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_altered_metadata(world: World, role: str) -> None:
    name, data = world.current(role)
    value = json.loads(data)
    value["signed"]["expires"] = "2040-01-01T00:00:00Z"
    world.tamper = {name: json.dumps(value).encode()}
    code = "bad-signature" if role == "timestamp" else f"altered-{role}"
    with refused(world, code, role, "expected", "got"):
        world.verify()


@pytest.mark.parametrize("junk", [b"", b"\0" * 100, b"[]", b'{"signed":{}}', b'{"signatures":[],"signed":1}'])
def test_garbage_instead_of_metadata(world: World, junk: bytes) -> None:
    world.tamper = {"timestamp.json": junk}
    with refused(world, "altered-timestamp", "timestamp metadata"):
        world.verify()
    world.verify()


def test_endless_metadata(world: World) -> None:
    world.tamper = {"timestamp.json": b" " * 20_000}
    with refused(world, "altered-timestamp", "at most 16384 bytes, got 20000"):
        world.verify()


def targets_signed_by(world: World, data: bytes) -> None:
    """Put targets metadata that the repository would refuse behind good online metadata."""
    version = signed_part(data)["version"]
    meta = MetaFile(version, len(data), {"sha256": sha256(data)})
    snapshot = Metadata(Snapshot(version=8, expires=days(1), meta={"targets.json": meta}))
    snapshot.sign(world.keys.snapshot)
    timestamp = Metadata(Timestamp(version=8, expires=days(1), snapshot_meta=MetaFile(8)))
    timestamp.sign(world.keys.timestamp)
    world.tamper = {
        "timestamp.json": timestamp.to_bytes(),
        "8.snapshot.json": snapshot.to_bytes(),
        f"{version}.targets.json": data,
    }


def test_one_signature_where_two_are_needed(world: World) -> None:
    world.verify()
    data = offline.add_target(world.targets_bytes, "node/x.tar.gz", 1, "0" * 64, {}, days(1))
    targets_signed_by(world, world.sign_targets(data, world.keys.targets[0]))
    with refused(
        world, "wrong-threshold", "targets version 3", "expected 2 signatures", "got 1 good and 0 bad"
    ):
        world.verify()


def test_stolen_online_keys_are_survived_by_changing_them(world: World) -> None:
    """A thief of the online keys can run the version numbers ahead; a new root with other keys heals it."""
    world.verify()
    snapshot = Metadata(Snapshot(version=99, expires=days(1), meta={"targets.json": MetaFile(99)}))
    snapshot.sign(world.keys.snapshot)
    timestamp = Metadata(Timestamp(version=99, expires=days(1), snapshot_meta=MetaFile(99)))
    timestamp.sign(world.keys.timestamp)
    world.tamper = {"timestamp.json": timestamp.to_bytes(), "99.snapshot.json": snapshot.to_bytes()}
    with refused(world, "stale-mirror", "targets version 99", kind="stale"):
        world.verify()
    with refused(world, "stale-mirror", "timestamp version 99 or later, got 1", kind="stale"):
        world.verify()
    world.keys.snapshot, world.keys.timestamp = signer(), signer()
    data = offline.next_root(world.root, world.keys.roles(), days(365))
    world.repository.publish_root(world.sign_root(data), now(), world.keys.online)
    assert world.verify().versions == {"root": 2, "timestamp": 2, "snapshot": 2, "targets": 2}


def test_two_signatures_by_one_key(world: World) -> None:
    data = offline.add_target(world.targets_bytes, "node/x.tar.gz", 1, "0" * 64, {}, days(1))
    value = json.loads(world.sign_targets(data, world.keys.targets[0]))
    value["signatures"] *= 2
    targets_signed_by(world, json.dumps(value).encode())
    with refused(world, "bad-signature", "targets version 3", "one signature a key"):
        world.verify()


def test_one_key_under_another_keys_name(world: World) -> None:
    data = offline.add_target(world.targets_bytes, "node/x.tar.gz", 1, "0" * 64, {}, days(1))
    metadata = Metadata.from_bytes(world.sign_targets(data, world.keys.targets[0]))
    first, second = (key.public_key.keyid for key in world.keys.targets[:2])
    metadata.signatures[second] = Signature(second, metadata.signatures[first].signature)
    targets_signed_by(world, metadata.to_bytes())
    with refused(world, "bad-signature", "expected 2 signatures", "got 1 good and 1 bad"):
        world.verify()


def test_keys_of_a_stranger(world: World) -> None:
    data = offline.add_target(world.targets_bytes, "node/x.tar.gz", 1, "0" * 64, {}, days(1))
    metadata = Metadata.from_bytes(data)
    for stranger in (signer(), signer()):
        metadata.sign(stranger, append=True)
    targets_signed_by(world, metadata.to_bytes())
    with refused(world, "wrong-threshold", "got 0 good and 0 bad"):
        world.verify()


def test_expired_root_blocks_updates_and_names_itself(world: World) -> None:
    world.verify()
    data = offline.next_root(world.root, {}, now() - timedelta(minutes=1))
    world.tamper = {"2.root.json": world.sign_root(data)}
    with refused(world, "expired-root", "root metadata version 2", "what runs goes on", kind="expired"):
        world.verify()
    # The node followed to root 2, as it must; the next root brings it back.
    renewed = world.sign_root(offline.next_root(world.sign_root(data), {}, days(365)))
    world.tamper = {"2.root.json": world.sign_root(data), "3.root.json": renewed}
    assert world.verify().versions["root"] == 3


def test_root_rotation_is_followed_from_the_pinned_one(world: World) -> None:
    world.verify()
    old = world.root
    for version in (2, 3):
        new = signer()
        retired = world.keys.root.pop(0)
        data = offline.replace_key(old, "root", retired.public_key.keyid, new.public_key, days(365))
        world.keys.root.append(new)
        both = (retired, *world.keys.root[:2])
        old = world.sign_root(data, *both, old=old)
        assert world.repository.publish_root(old, now()).root == version
    assert world.verify().versions["root"] == 3
    assert sorted(path.name for path in (world.trust / "tuf" / "root_history").iterdir()) == [
        "1.root.json",
        "2.root.json",
        "3.root.json",
    ]
    assert (world.trust / "pinned-root.json").read_bytes() == world.root


def test_root_that_only_the_new_keys_signed(world: World) -> None:
    world.verify()
    world.keys.root = [signer(), signer(), signer()]
    data = offline.next_root(world.root, {"root": world.keys.roles()["root"]}, days(365))
    world.tamper = {"2.root.json": world.sign_root(data)}
    with refused(world, "wrong-threshold", "root version 2", "trusted root (version 1)", "got 0 good"):
        world.verify()
    assert world.verify().versions["root"] == 1


def test_root_that_skips_a_version(world: World) -> None:
    two = world.sign_root(offline.next_root(world.root, {}, days(365)))
    three = world.sign_root(offline.next_root(two, {}, days(365)))
    world.tamper = {"2.root.json": three}
    with refused(world, "wrong-root-version", "Expected root version 2", "got version 3"):
        world.verify()


def test_unlisted_target(world: World) -> None:
    with refused(world, "no-such-target", "node/instar-9.tar.gz", "version 2", kind="absent"):
        world.verify("node/instar-9.tar.gz")


def test_unreachable_server_decides_nothing(world: World) -> None:
    world.verify()
    world.unreachable = True
    with refused(world, "server-unreachable", "cannot reach", kind="unreachable"):
        world.verify()


def test_refusal_keeps_the_servers_own_code(world: World) -> None:
    def revoked(path: str) -> bytes:
        raise ServerRefused("revoked", "cannot serve n-1: its certificate is revoked")

    world.fetch = revoked  # type: ignore[method-assign]
    with refused(world, "revoked", "certificate is revoked", kind="refused"):
        world.verify()


def test_server_without_metadata(world: World) -> None:
    world.tamper = {"timestamp.json": None}
    with refused(world, "no-metadata", "no timestamp.json", kind="unreachable"):
        world.verify()


@pytest.mark.parametrize(
    "name", ["timestamp.json", "snapshot.json", "targets.json", "root_history/1.root.json"]
)
@pytest.mark.parametrize("damage", [b"", b"\0" * 512, b'{"signed": {"_type": "ti'])
def test_torn_local_metadata_is_fetched_again(world: World, name: str, damage: bytes) -> None:
    world.verify()
    (world.trust / "tuf" / name).write_bytes(damage)
    assert world.verify().dropped == [name.rpartition("/")[2]]
    assert world.verify().dropped == []


def test_torn_later_root_starts_over_from_the_pinned_one(world: World) -> None:
    data = offline.next_root(world.root, {}, days(365))
    world.repository.publish_root(world.sign_root(data), now())
    world.verify()
    (world.trust / "tuf" / "root_history" / "2.root.json").write_bytes(b"\0\0\0")
    found = world.verify()
    assert (found.versions["root"], found.dropped) == (2, ["2.root.json"])


def test_unusable_pinned_root_is_named(world: World) -> None:
    pinned = world.trust / "pinned-root.json"
    pinned.write_bytes(b"{}")
    with pytest.raises(TrustError) as caught:
        world.verify()
    assert caught.value.code == "bad-pinned-root"
    pinned.unlink()
    with pytest.raises(TrustError) as caught:
        world.verify()
    assert caught.value.code == "no-pinned-root"
    assert str(pinned) in caught.value.text


def test_scratch_of_a_killed_verification_is_cleared(world: World) -> None:
    scratch = world.trust / "scratch" / "root_history"
    scratch.mkdir(parents=True)
    (scratch / "7.root.json").write_bytes(b"{}")
    world.verify()
    assert not (world.trust / "scratch").exists()
    assert not (world.trust / "tuf" / "root_history" / "7.root.json").exists()


def test_expired_online_metadata_is_signed_anew_by_the_server(world: World) -> None:
    before = {row.role: row.version for row in world.repository.status(now())}
    assert not world.repository.refresh(now())
    assert world.repository.refresh(now() + timedelta(hours=13))
    after = {row.role: row.version for row in world.repository.status(now())}
    assert after["timestamp"] == before["timestamp"] + 1
    assert after["targets"] == before["targets"]
    world.verify()


def test_unreachable_is_an_error_of_the_passing_class() -> None:
    assert kind_of(ServerUnreachable("server-busy", "x")) == "unreachable"
