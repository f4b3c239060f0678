"""The repository: what it refuses to publish, changes of root, and a kill after every file operation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from instar.core.errors import InputError, InstarError, MachineError, ServerRefused, TrustError
from instar.oneshot.metadata import verify_target
from instar_server.trust import offline
from instar_server.trust.files import Disk
from instar_server.trust.pack import pack_release
from instar_server.trust.records import OnlineSigners
from instar_server.trust.repository import Repository
from tests.trust.world import PATH, Keys, World, days, now, program, sha256, signed_part, signer


class Killed(BaseException):
    """The process died here. No `except OSError` or `except Exception` may survive it."""


class DyingDisk(Disk):
    """Dies before the call with the number `after`, as a SIGKILL would."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.calls = 0

    def _step(self) -> None:
        if self.calls >= self.left:
            raise Killed
        self.calls += 1

    def write_new(self, path: Path, data: bytes, mode: int) -> None:
        if self.calls >= self.left:
            path.write_bytes(data[: len(data) // 2])  # torn
        self._step()
        super().write_new(path, data, mode)

    def rename(self, old: Path, new: Path) -> None:
        self._step()
        super().rename(old, new)

    def link(self, old: Path, new: Path) -> None:
        self._step()
        super().link(old, new)

    def unlink(self, path: Path) -> None:
        self._step()
        super().unlink(path)

    def mkdir(self, path: Path) -> None:
        self._step()
        super().mkdir(path)

    def sync(self, path: Path) -> None:
        self._step()
        super().sync(path)


# Each prepares a change, signed once, and returns the call that publishes it.
Change = Callable[[World], Callable[[], object]]


def publish_release(world: World) -> Callable[[], object]:
    data = world.sign_targets(world.with_release(pack_release(program("print(2)"), "1.2.0")))
    return lambda: world.repository.publish_targets(data, now())


def publish_root(world: World) -> Callable[[], object]:
    data = world.sign_root(offline.next_root(world.root, {}, days(300)))
    return lambda: world.repository.publish_root(data, now())


def publish_online_keys(world: World) -> Callable[[], object]:
    world.keys.snapshot, world.keys.timestamp = signer(), signer()
    data = world.sign_root(offline.next_root(world.root, world.keys.roles(), days(300)))
    return lambda: world.repository.publish_root(data, now(), world.keys.online)


def refresh(world: World) -> Callable[[], object]:
    return lambda: world.repository.refresh(now() + timedelta(hours=13))


@pytest.mark.parametrize("change", [publish_release, publish_root, publish_online_keys, refresh])
def test_kill_after_every_file_operation(tmp_path: Path, change: Change) -> None:
    """Whatever the moment: what is served verifies, never goes back, and the change can be made again."""
    for step in range(200):
        disk = DyingDisk(step)
        if not killed_at(tmp_path / str(step), change, disk):
            assert step >= 3, "the change made hardly any file operation"
            return
    pytest.fail("the change never ended")


def killed_at(folder: Path, prepare: Change, disk: DyingDisk) -> bool:
    folder.mkdir()
    world = World(folder)
    world.publish("1.1.0")
    old_keys = world.keys.online
    before = world.verify().versions
    change = prepare(world)
    world.repository.close()
    world.repository = Repository.open(world.folder / "repository", old_keys, now(), disk=disk)
    try:
        change()
        died = False
    except Killed:
        died = True
    world.repository.close()
    assert follows_from(world, folder) is None
    merged = OnlineSigners(
        (*old_keys.snapshot, world.keys.snapshot), (*old_keys.timestamp, world.keys.timestamp)
    )
    world.repository = Repository.open(world.folder / "repository", merged, now())
    middle = world.verify().versions
    assert all(middle[role] >= before[role] for role in before), (before, middle)
    change()
    after = world.verify().versions
    assert all(after[role] >= middle[role] for role in middle), (middle, after)
    world.repository.close()
    return died


def follows_from(world: World, folder: Path) -> str | None:
    """What a node says that meets the files exactly as the dead process left them; None when all is well."""

    def fetch(path: str) -> bytes:
        try:
            return (folder / "repository" / path).read_bytes()
        except FileNotFoundError:
            raise ServerRefused("no-metadata", path) from None

    trust = shutil.copytree(world.trust, folder / "another")
    try:
        verify_target(trust, PATH, fetch, now())
    except InstarError as error:
        return f"{error.code}: {error.text}"
    return None


def test_a_new_timestamp_is_served_only_when_it_is_durable(world: World) -> None:
    """Between the rename and the sync of the folder a power cut may still take the file back."""
    before = world.repository.metadata("timestamp.json")
    world.repository.close()
    seen = []

    class Watching(Disk):
        def sync(self, path: Path) -> None:
            seen.append(world.repository.metadata("timestamp.json"))
            super().sync(path)

    world.repository = world.open(Watching())
    publish_release(world)()
    assert seen
    assert set(seen) == {before}
    assert world.repository.metadata("timestamp.json") != before


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda w, d: w.sign_targets(d, w.keys.targets[0]), "wrong-threshold", "expected 2 signatures"),
        (lambda w, d: d, "wrong-threshold", "got 0 good and 0 bad"),
        (
            lambda w, d: w.sign_targets(d).replace(b'"version":3', b'"version":4'),
            "bad-signature",
            "0 good and 2 bad",
        ),
        (lambda w, d: b"{}", "bad-metadata", "cannot read targets"),
        (lambda w, d: w.root, "wrong-role", "expected targets, got root"),
    ],
)
def test_targets_that_are_not_published(
    world: World, change: Callable[[World, bytes], bytes], code: str, words: str
) -> None:
    served = world.served()
    data = change(world, world.with_release(pack_release(program("print(2)"), "1.2.0")))
    with pytest.raises(InstarError) as caught:
        world.repository.publish_targets(data, now())
    assert caught.value.code == code
    assert words in caught.value.text
    assert world.served() == served


def test_old_and_repeated_targets(world: World) -> None:
    first = world.targets_bytes
    published = world.repository.publish_targets(first, now())
    assert published.timestamp == 1, "the same bytes again change nothing"
    world.publish("1.2.0")
    with pytest.raises(InputError) as caught:
        world.repository.publish_targets(first, now())
    assert caught.value.code == "old-targets"
    assert "expected a version over 3, got 2" in caught.value.text


def test_expired_targets(world: World) -> None:
    release = pack_release(program("print(2)"), "1.2.0")
    data = world.sign_targets(world.with_release(release, expires=now() - timedelta(days=1)))
    with pytest.raises(TrustError) as caught:
        world.repository.publish_targets(data, now())
    assert caught.value.code == "expired"


def test_target_whose_blob_is_absent_or_of_another_length(world: World) -> None:
    data = offline.add_target(world.targets_bytes, "node/x.tar.gz", 3, sha256(b"abc"), {}, days(1))
    with pytest.raises(InputError) as caught:
        world.repository.publish_targets(world.sign_targets(data), now())
    assert (caught.value.code, "node/x.tar.gz" in caught.value.text) == ("missing-blob", True)
    world.add_blob(b"abc")
    data = offline.add_target(world.targets_bytes, "node/x.tar.gz", 4, sha256(b"abc"), {}, days(1))
    with pytest.raises(InputError) as caught:
        world.repository.publish_targets(world.sign_targets(data), now())
    assert (caught.value.code, "expected 4 bytes, got 3" in caught.value.text) == ("blob-mismatch", True)


def test_blob_that_rotted_on_the_servers_disk(world: World) -> None:
    digest = world.add_blob(b"abc")
    (world.folder / "repository" / "blobs" / digest).write_bytes(b"abd")
    data = offline.add_target(world.targets_bytes, "node/x.tar.gz", 3, digest, {}, days(1))
    with pytest.raises(InputError) as caught:
        world.repository.publish_targets(world.sign_targets(data), now())
    assert (caught.value.code, "expected sha256" in caught.value.text) == ("blob-mismatch", True)


def test_an_upload_mends_what_is_served(world: World) -> None:
    digest = world.add_blob(b"abc")
    data = offline.add_target(world.targets_bytes, "node/x.tar.gz", 3, digest, {}, days(1))
    world.repository.publish_targets(world.sign_targets(data), now())
    served = world.repository.target_file(f"node/{digest}.x.tar.gz")
    assert served is not None
    served.write_bytes(b"abd")
    world.add_blob(b"abc")
    assert served.read_bytes() == b"abc"
    assert not list(world.repository.blobs.staging.glob(".*"))


def test_blob_that_is_not_what_the_uploader_said(world: World) -> None:
    temporary = world.repository.blobs.staging / "part"
    temporary.write_bytes(b"abc")
    with pytest.raises(InputError) as caught:
        world.repository.blobs.add(temporary, "0" * 64)
    assert caught.value.code == "blob-mismatch"
    assert temporary.exists()


@pytest.mark.parametrize(
    "path", ["../../metadata/timestamp.json", "/etc/passwd", "node/../x", "", "node//x", "a\\b"]
)
def test_paths_that_lead_out_serve_nothing(world: World, path: str) -> None:
    assert world.repository.target_file(path) is None


@pytest.mark.parametrize(
    "name",
    [
        "../lock",
        "0.root.json",
        "root.json",
        "1.timestamp.json",
        "9.root.json",
        "1.root.json/",
        ".timestamp.json.new",
    ],
)
def test_names_that_are_no_metadata(world: World, name: str) -> None:
    assert world.repository.metadata(name) is None


def test_target_path_that_leads_out_is_not_signed(world: World) -> None:
    with pytest.raises(InputError) as caught:
        offline.add_target(world.targets_bytes, "../x", 1, "0" * 64, {}, days(1))
    assert caught.value.code == "bad-path"


def change_roles(world: World, **roles: Any) -> bytes:
    return offline.next_root(world.root, {**world.keys.roles(), **roles}, days(300))


def test_root_needs_both_thresholds(world: World) -> None:
    old, world.keys = world.keys, Keys.make()
    data = change_roles(world)
    for signers, words in (
        (world.keys.root[:2], "root version 1"),
        (old.root[:2], "this root itself"),
        ((old.root[0], *world.keys.root[:2]), "got 1 good"),
    ):
        signed = world.sign_root(data, *signers, old=world.root)
        with pytest.raises(TrustError) as caught:
            world.repository.publish_root(signed, now(), world.keys.online)
        assert caught.value.code == "wrong-threshold"
        assert words in caught.value.text


def test_root_under_which_the_served_targets_would_not_verify(world: World) -> None:
    world.keys.targets = [signer(), signer(), signer()]
    data = world.sign_root(change_roles(world))
    with pytest.raises(TrustError) as caught:
        world.repository.publish_root(data, now())
    assert caught.value.code == "targets-not-under-root"
    assert "Publish targets signed by the old and the new keys first" in caught.value.text


def test_root_whose_online_keys_the_server_lacks(world: World) -> None:
    data = world.sign_root(
        offline.next_root(
            world.root,
            Keys.make().roles()
            | {role: keys for role, keys in world.keys.roles().items() if role in ("root", "targets")},
            days(300),
        )
    )
    with pytest.raises(InputError) as caught:
        world.repository.publish_root(data, now())
    assert caught.value.code == "wrong-online-keys"
    assert "snapshot" in caught.value.text


def test_root_that_skips_a_version_or_has_expired(world: World) -> None:
    two = world.sign_root(offline.next_root(world.root, {}, days(300)))
    three = world.sign_root(offline.next_root(two, {}, days(300)))
    with pytest.raises(InputError) as caught:
        world.repository.publish_root(three, now())
    assert (caught.value.code, "expected version 2, got 3" in caught.value.text) == (
        "wrong-root-version",
        True,
    )
    late = world.sign_root(offline.next_root(world.root, {}, now() - timedelta(days=1)))
    with pytest.raises(TrustError) as error:
        world.repository.publish_root(late, now())
    assert error.value.code == "expired"


def test_one_process_at_a_time(world: World) -> None:
    with pytest.raises(MachineError) as caught:
        world.open()
    assert caught.value.code == "repository-in-use"


def test_damaged_metadata_is_named(world: World) -> None:
    name, _ = world.current("targets")
    world.repository.close()
    path = world.folder / "repository" / "metadata" / name
    path.write_bytes(b"{")
    with pytest.raises(TrustError) as caught:
        world.open()
    assert (caught.value.code, str(path) in caught.value.text) == ("repository-damaged", True)
    path.unlink()
    with pytest.raises(TrustError) as caught:
        world.open()
    assert (caught.value.code, str(path) in caught.value.text) == ("repository-damaged", True)
    path.write_bytes(world.targets_bytes)
    world.repository = world.open()


def test_create_is_idempotent_but_takes_no_other_root(world: World) -> None:
    world.repository.close()
    world.repository = world.create()
    assert [row.version for row in world.repository.status(now()) if row.role == "targets"] == [2]
    world.repository.close()
    world.root = world.sign_root(offline.first_root(world.keys.roles(), days(5)))
    with pytest.raises(InputError) as caught:
        world.create()
    assert caught.value.code == "repository-exists"
    world.repository = world.open()


def test_status_tells_versions_thresholds_and_expiry(world: World) -> None:
    rows = {row.role: row for row in world.repository.status(now() + timedelta(days=2))}
    assert (rows["root"].threshold, rows["root"].keys, rows["targets"].version) == (2, 3, 2)
    assert (rows["timestamp"].expired, rows["targets"].expired) == (True, False)


def test_targets_are_listed_with_what_their_signers_said(world: World) -> None:
    [target] = world.repository.targets()
    assert target.custom["kind"] == "node"
    assert set(target.custom) == {"kind", "version", "program_digest", "python"}
    assert signed_part(world.targets_bytes)["targets"][target.path]["hashes"] == {"sha256": target.sha256}
    json.dumps(target.custom)
