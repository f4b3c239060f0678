"""What an attacker, a mirror or time does to a module: `fetch-module` and the operator's side refuse it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, Timestamp

from instar.core.errors import InstarError
from instar.trust.module import module_digest
from instar_server.trust.module_source import pack_module
from instar_server.trust.pack import Release, release_of
from tests.node.world import member, tar_gz
from tests.trust.modules import FILES, GOOD, MAIN, NAME, PATH, Fetcher, Source, forged, manifest
from tests.trust.world import now


def test_another_manifest_than_was_signed(node: Fetcher) -> None:
    other = manifest(FILES, about="another one")
    wanted = module_digest(GOOD)
    release = node.publish(forged(other, FILES, digest=wanted))
    node.refused(release, "altered-manifest", "trust", wanted[:12], module_digest(other)[:12])


def test_a_file_that_is_not_the_manifests(node: Fetcher) -> None:
    release = node.publish(forged(GOOD, {"main.py": MAIN.replace("args", "argv", 1).encode()}))
    node.refused(release, "altered-file", "trust", "main.py")


def test_another_name_in_the_archive(node: Fetcher) -> None:
    release = node.publish(forged(manifest(FILES, name="demo.other"), FILES))
    node.refused(release, "altered-manifest", "trust", "expected module demo.once, got demo.other")


def test_another_version_in_the_archive(node: Fetcher) -> None:
    release = node.publish(forged(manifest(FILES, version="9.0.0"), FILES))
    node.refused(release, "altered-manifest", "trust", "9.0.0")


def test_a_module_of_another_name_under_the_path(node: Fetcher) -> None:
    release = node.publish(forged(manifest(FILES, name="demo.other"), FILES, name="demo.other"))
    node.refused(release, "wish-differs", "trust", "name demo.once", "demo.other")


@pytest.mark.parametrize("field", ["digest", "version", "kind"])
def test_words_of_the_signers_that_do_not_fit_the_job(node: Fetcher, field: str) -> None:
    other = {"digest": "0" * 96, "version": "2.0.0", "kind": "node"}[field]
    release = node.publish(forged(GOOD, FILES, **{field: other}))
    wanted = Release(PATH, b"", "", {"kind": "module", "digest": module_digest(GOOD)})
    node.refused(wanted, "wish-differs", "trust", field, other, digest=module_digest(GOOD))
    assert release.custom[field] == other


def test_a_node_program_is_no_module(node: Fetcher) -> None:
    program = node.world.repository.targets()[0]
    digest = program.custom["program_digest"]
    release = Release(program.path, b"", "", {"kind": "module", "digest": digest})
    node.refused(release, "wish-differs", "trust", version="1.1.0", target="node/instar-1.1.0.tar.gz")


def test_a_blob_that_a_mirror_altered(node: Fetcher, source: Source) -> None:
    release = node.publish(pack_module(source()))
    served = f"module/{release.sha256}.{NAME}-1.0.0.tar.gz"
    middle = len(release.archive) // 2
    data = bytearray(release.archive)
    data[middle] ^= 1
    node.world.tamper[served] = bytes(data)
    node.refused(release, "altered-blob", "trust")
    node.world.tamper[served] = release.archive + b"more"
    node.refused(release, "longer-than-signed", "trust")
    node.world.tamper.clear()
    assert node.fetch(release)["ok"] is True, "what was wrong is not kept for the next try"


ESCAPES: dict[str, tuple[bytes, dict[str, bytes]]] = {
    "out by dots": (manifest({**FILES, "../evil": b"x"}), {**FILES, "../evil": b"x"}),
    "absolute": (manifest({**FILES, "/tmp/evil": b"x"}), {**FILES, "/tmp/evil": b"x"}),
    "unlisted, out": (GOOD, {**FILES, "../../../evil": b"x"}),
    "unlisted": (GOOD, {**FILES, "evil": b"x"}),
    "the marker": (GOOD, {**FILES, "valid": b"x"}),
}


@pytest.mark.parametrize("case", list(ESCAPES))
def test_a_path_that_escapes(node: Fetcher, case: str) -> None:
    release = node.publish(forged(*ESCAPES[case]))
    node.refused(release, "bad-archive", "trust")
    assert not Path("/tmp/evil").exists()


def test_a_link_that_leads_out(node: Fetcher) -> None:
    said = manifest({**FILES, "data": b""})
    members = [
        member("manifest.json", said),
        member("main.py", MAIN.encode()),
        member("data", b"", tarfile.SYMTYPE, "/etc/shadow"),
    ]
    archive = tar_gz(members)
    custom = {"kind": "module", "name": NAME, "version": "1.0.0", "digest": module_digest(said)}
    release = node.publish(Release(PATH, archive, hashlib.sha256(archive).hexdigest(), custom))
    node.refused(release, "bad-archive", "trust", "symbolic link")


HUGE: dict[str, dict[str, Any]] = {
    "memory": {"limits": {"memory": 1 << 60}},
    "negative": {"limits": {"processes": -1}},
    "a truth": {"limits": {"files": True}},
    "seconds": {"timeouts": {"run_s": 1e300}},
    "files": {"files": [{"path": "main.py", "size": 1 << 50, "sha256": "0" * 64, "mode": "0755"}]},
    "depth": {"about": [[[[[[]]]]]]},
    "nobody's mode": {"files": [{"path": "main.py", "size": 1, "sha256": "0" * 64, "mode": "4755"}]},
}


@pytest.mark.parametrize("case", list(HUGE))
def test_a_manifest_with_huge_limits(node: Fetcher, case: str) -> None:
    release = node.publish(forged(manifest(FILES, **HUGE[case]), FILES))
    node.refused(release, "bad-archive", "trust")


def test_a_bomb_behind_a_good_manifest(node: Fetcher) -> None:
    release = node.publish(forged(GOOD, {"main.py": bytes(64 << 20)}))
    node.refused(release, "bad-archive", "trust", f"expected {len(MAIN)} bytes, got {64 << 20}")


def test_expired_metadata_keeps_new_ones_away_and_lets_old_ones_run(node: Fetcher, source: Source) -> None:
    first = node.publish(pack_module(source()))
    assert node.fetch(first)["ok"] is True
    second = node.publish(pack_module(source(version="1.1.0")))
    timestamp = Metadata[Timestamp].from_bytes(node.world.current("timestamp")[1])
    timestamp.signed.expires = now() - timedelta(hours=1)
    timestamp.sign(node.world.keys.timestamp)
    node.world.tamper = {"timestamp.json": timestamp.to_bytes()}
    answer = node.fetch(second, version="1.1.0", target=second.path)
    assert (answer["ok"], answer["error"]["code"], answer["kind"]) == (False, "expired-timestamp", "expired")
    assert node.fetch(first)["ok"] is True
    assert node.line.names() == [f"1.0.0-{first.digest[:12]}"]


def test_a_stale_mirror_and_a_target_that_is_not_there(node: Fetcher, source: Source) -> None:
    old = node.world.served()
    release = pack_module(source())
    node.refused(release, "no-such-target", "absent")
    node.publish(release)
    node.world.verify(PATH)
    node.world.tamper = dict(old)
    node.refused(release, "stale-mirror", "stale", "waiting")
    node.world.tamper.clear()
    assert node.fetch(release)["ok"] is True


def test_signatures_that_do_not_hold(node: Fetcher, source: Source) -> None:
    release = node.publish(pack_module(source()))
    name, targets = node.world.current("targets")
    node.world.tamper = {name: targets.replace(b"1.0.0", b"1.0.9")}
    node.refused(release, "altered-targets", "trust")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"name": "../../etc"}, "bad-module-name"),
        ({"name": ""}, "bad-module-name"),
        ({"version": "../1.0.0"}, "bad-version"),
        ({"digest": "../x"}, "bad-digest"),
        ({"digest": "A" * 96}, "bad-digest"),
        ({"target": "../../metadata/root.json"}, "bad-path"),
        ({"target": "/etc/passwd"}, "bad-path"),
    ],
)
def test_words_that_lead_elsewhere(node: Fetcher, options: dict[str, str], code: str) -> None:
    release = Release(PATH, b"", "", {"kind": "module", "digest": "0" * 96})
    node.refused(release, code, "input", **options)
    assert not node.layout.modules.exists()


def test_a_folder_of_the_same_short_name_is_not_taken_for_it(node: Fetcher, source: Source) -> None:
    """Twelve digits name a folder, all of them the release."""
    release = node.publish(pack_module(source()))
    assert node.fetch(release)["ok"] is True
    twin = release.digest[:12] + "0" * 84
    answer = node.fetch(release, digest=twin)
    assert answer["ok"] is False
    assert answer["error"]["code"] == "wish-differs"


def test_a_wrong_state_folder_is_left_alone(node: Fetcher, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    command = node.command(Release(PATH, b"", "", {"kind": "module", "digest": "0" * 96}))
    command[command.index("--state") + 1] = str(empty)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["error"]["code"] == "no-server"
    assert list(empty.iterdir()) == []


# ---- the operator's side refuses the same


@pytest.mark.parametrize("case", ["a file", "a path", "limits"])
def test_a_forged_archive_is_not_listed_for_signing(case: str) -> None:
    archive = {
        "a file": lambda: forged(GOOD, {"main.py": b"x" * len(MAIN)}),
        "a path": lambda: forged(*ESCAPES["out by dots"]),
        "limits": lambda: forged(manifest(FILES, limits={"memory": 1 << 60}), FILES),
    }[case]().archive
    with pytest.raises(InstarError):
        release_of(archive)
