"""Attacks on what a node trusts, against a live node: updates wait or are refused, what runs goes on running."""

from __future__ import annotations

import json
import re
import shutil
from datetime import UTC, datetime, timedelta
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Timestamp

from instar_lab import machine
from instar_lab.node import Node
from instar_lab.server import PASSPHRASE, LabServer, in_days
from instar_server.trust import keys, offline
from tests.e2e.conftest import ALTERED, NEW, OLD, Stage, cli, health, log_has, look, settled, updates
from tests.e2e.mirror import Answer, Mirror, Request


class Forger:
    """Signs whatever is asked for with the fleet's own keys: what a thief, or an old copy, could serve."""

    def __init__(self, server: LabServer) -> None:
        self.server = server

    def key(self, name: str) -> CryptoSigner:
        folder = "online" if name in ("timestamp", "snapshot") else "keys"
        return keys.load(self.server.folder / folder / f"{name}.key", lambda _: PASSPHRASE)

    def served(self, name: str) -> bytes:
        return (self.server.layout.trust / "metadata" / name).read_bytes()

    def timestamp(self) -> Metadata[Timestamp]:
        return Metadata[Timestamp].from_bytes(self.served("timestamp.json"))

    def snapshot(self) -> Metadata[Snapshot]:
        version = self.timestamp().signed.snapshot_meta.version
        return Metadata[Snapshot].from_bytes(self.served(f"{version}.snapshot.json"))

    def root(self) -> Metadata[Root]:
        roots = (self.server.layout.trust / "metadata").glob("*.root.json")
        newest = max(roots, key=lambda path: int(path.name.split(".")[0]))
        return Metadata[Root].from_bytes(newest.read_bytes())

    def signed(self, metadata: Metadata[Any], *names: str) -> bytes:
        metadata.signatures.clear()
        for name in names:
            metadata.sign(self.key(name), append=True)
        return metadata.to_bytes()


def serve(mirror: Mirror, files: dict[str, bytes]) -> None:
    """Have the mirror serve these metadata files in place of the server's."""

    def rule(request: Request) -> Answer | None:
        data = files.get(request.path.rpartition("/")[2])
        return Answer(200, data) if data is not None else None

    mirror.rule = rule


def noted(node: Node, words: str) -> dict[str, Any]:
    """Wait until the newest transaction tells `words`; it must not have moved anything."""
    look(node)

    def told() -> dict[str, Any] | None:
        found = node.history()
        newest = found[-1] if found else {"changes": [], "reason": None}
        texts = [change["reason"] for change in newest["changes"]]
        return newest if any(words in text for text in texts) else None

    return machine.wait_for(
        told, f"{words!r} in the history", 60.0, lambda: node.cli("history") + node.logs()
    )


def test_a_blob_that_was_altered_after_signing(stage: Stage) -> None:
    node = stage.node()
    before = health(node)["pid"]
    stage.want(ALTERED, ("agent",))
    look(node)
    (entry,) = settled(node, 1)
    assert (entry["state"], entry["reason"]["code"]) == ("reverted", "altered-blob")
    assert stage.hall.releases[ALTERED].sha256 in entry["reason"]["text"]
    machine.wait_for(
        lambda: "altered-blob" in {e["reason_code"] for e in stage.server.history(node.id)},
        "its reason at the server", 60.0, node.logs,
    )  # fmt: skip
    assert health(node)["pid"] == before
    assert node.digests()["agent"] == stage.hall.programs[OLD].digest
    assert list(node.layout.staging.iterdir()) == []
    releases = {path.name for path in node.layout.line("agent").releases.iterdir()}
    assert releases == {stage.hall.programs[OLD].release}
    stage.want(NEW, ("agent",))
    updates(node, NEW, ("agent",), before=1)


def test_a_mirror_that_lies(stage: Stage) -> None:
    node, mirror = stage.mirrored()
    forger = Forger(stage.server)
    stage.want(NEW, ("updater",))
    updates(node, NEW, ("updater",))
    agent = health(node)["pid"]

    older = forger.timestamp()
    older.signed.version -= 1
    serve(mirror, {"timestamp.json": forger.signed(older, "timestamp")})
    stage.want(NEW, ("agent",))
    entry = noted(node, "stale mirror")
    assert entry["state"] == "offered"

    expired = forger.timestamp()
    expired.signed.version += 1
    expired.signed.expires = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
    serve(mirror, {"timestamp.json": forger.signed(expired, "timestamp")})
    entry = noted(node, "expired at")
    assert entry["state"] == "offered"
    assert any("what runs goes on running" in change["reason"] for change in entry["changes"])
    node.cli("stop")
    node.cli("start")
    stage.connected(node)  # an expired signature never stops a start
    assert health(node)["pid"] != agent
    agent = health(node)["pid"]

    def refused(files: dict[str, bytes], code: str, count: int) -> None:
        """Refused, the release not blamed for it; a new wish is tried at once."""
        serve(mirror, files)
        if count > 2:  # the second transaction is open still
            stage.want(NEW, ("agent",))
        look(node)
        entry = settled(node, count)[-1]
        assert (entry["state"], entry["reason"]["code"]) == ("reverted", code), entry
        assert not json.loads(node.cli("quarantine", "--json"))["entries"]

    # A snapshot of another version, rightly signed, under the name that the timestamp gives.
    timestamp, snapshot = forger.timestamp(), forger.snapshot()
    snapshot.signed.version += 7
    other = forger.signed(snapshot, "snapshot")
    timestamp.signed.version += 2  # the expired one was one on
    timestamp.signed.snapshot_meta.version += 1
    timestamp.signed.snapshot_meta.length = timestamp.signed.snapshot_meta.hashes = None
    name = f"{timestamp.signed.snapshot_meta.version}.snapshot.json"
    refused({"timestamp.json": forger.signed(timestamp, "timestamp"), name: other}, "mixed-snapshot", 2)

    # The next root, signed by one key where two are needed, and by keys that nobody knows.
    root = forger.root()
    root.signed.version += 1
    name = f"{root.signed.version}.root.json"
    refused({name: forger.signed(root, "root-2")}, "wrong-threshold", 3)
    refused({name: forger.signed(root, "targets-2", "snapshot")}, "wrong-threshold", 4)
    refused({name: b'{"signed": {"_type": "root"'}, "altered-root", 5)
    assert health(node)["pid"] == agent
    assert node.digests()["agent"] == stage.hall.programs[OLD].digest

    # And all is well once the truth is served: newer than what was accepted on the way.
    timestamp, snapshot = forger.timestamp(), forger.snapshot()
    timestamp.signed.version += 10
    snapshot.signed.version += 2
    timestamp.signed.snapshot_meta = MetaFile(snapshot.signed.version)
    name = f"{snapshot.signed.version}.snapshot.json"
    truth = {
        "timestamp.json": forger.signed(timestamp, "timestamp"),
        name: forger.signed(snapshot, "snapshot"),
    }
    serve(mirror, truth)
    stage.want(NEW, ("agent",))
    updates(node, NEW, ("agent",), before=5)


def test_an_expired_root_stops_updates_and_nothing_else(stage: Stage) -> None:
    node, mirror = stage.mirrored()
    forger = Forger(stage.server)
    root = forger.root()
    root.signed.version += 1
    root.signed.expires = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
    signers = (
        ("root-2", "root-3")
        if (forger.server.folder / "keys" / "root-4.key").exists()
        else ("root-1", "root-2")
    )
    serve(mirror, {f"{root.signed.version}.root.json": forger.signed(root, *signers)})
    stage.want(NEW)
    entry = noted(node, "root metadata version")
    assert entry["state"] == "offered"
    assert "expired at" in str(entry["changes"])
    node.cli("stop")
    node.cli("start")
    stage.connected(node)
    assert node.digests()["agent"] == stage.hall.programs[OLD].digest


def test_keys_change_during_a_nodes_life(stage: Stage) -> None:
    """One key of root and one of targets are replaced; then a release is signed by the new ones."""
    node = stage.node()
    stage.want(NEW, ("updater",))
    updates(node, NEW, ("updater",))  # it has seen the old root
    server, forger = stage.server, Forger(stage.server)
    folder = server.folder / "keys"
    root = server.api.get_bytes("/trust/metadata/root.json")
    fresh = {role: keys.generate(folder, f"{role}-4", PASSPHRASE) for role in ("root", "targets")}
    replaced = offline.replace_key(
        root, "targets", forger.key("targets-1").public_key.keyid, fresh["targets"], in_days(300)
    )
    once = Metadata[Root].from_bytes(replaced)
    replaced = offline.replace_key(
        replaced, "root", forger.key("root-1").public_key.keyid, fresh["root"], in_days(300)
    )
    twice = Metadata[Root].from_bytes(replaced)
    twice.signed.version = once.signed.version
    data = twice.to_bytes()
    for name in ("root-1", "root-2", "root-4"):
        data = offline.sign(data, forger.key(name), [root])

    # First targets that hold under both roots, then the root, then a release under the new root alone.
    targets = offline.add_target(
        server.api.get_bytes("/trust/metadata/targets.json"), *_target(stage, NEW), in_days(80)
    )
    for name in ("targets-1", "targets-2", "targets-4"):
        targets = offline.sign(targets, forger.key(name), [root, data])
    server.api.put_bytes("/trust/targets", targets)
    server.api.put_bytes("/trust/root", data)
    server._signers = {
        role: [forger.key(f"{role}-{number}") for number in (2, 4)] for role in ("root", "targets")
    }
    stage.hall.publish("1.5.0")
    stage.want("1.5.0")
    updates(node, "1.5.0", before=1)
    held = json.loads((node.layout.trust / "tuf" / "targets.json").read_bytes())
    assert {each["keyid"] for each in held["signatures"]} <= {
        forger.key(f"targets-{n}").public_key.keyid for n in (2, 4)
    }


def _target(stage: Stage, version: str) -> tuple[str, int, str, dict[str, Any]]:
    release = stage.hall.releases[version]
    return release.path, len(release.archive), release.sha256, release.custom


def test_a_certificate_of_somebody_else(stage: Stage) -> None:
    victim, thief = stage.node(), stage.node(start=False)
    for name in ("key.pem", "cert.pem"):
        shutil.copy(victim.layout.identity / name, thief.layout.identity / name)
    thief.cli("start")
    assert "identity-mismatch" in log_has(thief, "agent", "refused by the server")
    assert health(thief)["connected"] is False
    assert health(victim)["connected_for_s"] > 0.5  # the true one was not disturbed
    assert "connected; the server" not in (thief.layout.run / "agent.log").read_text()


def test_a_revoked_node_stays_up_and_stays_away(stage: Stage) -> None:
    node = stage.node()
    pids = {role: node.pid(role) for role in ("agent", "updater")}
    stage.server.api.post(f"/nodes/{node.id}/revoke", {"why": "lost laptop"})
    log_has(node, "agent", "(revoked)")
    log = node.layout.run / "agent.log"

    def stays_away() -> bool:
        return any(float(each) > 600 for each in re.findall(r"next try in (\d+\.\d)", log.read_text()))

    machine.wait_for(stays_away, "a try in more than 600 s", 60.0, node.logs)
    stage.want(NEW)
    look(node)
    assert "revoked" in log_has(node, "updater", "WARNING")
    assert {role: node.pid(role) for role in pids} == pids
    assert health(node)["connected"] is False
    node.cli("stop")
    node.cli("start")  # comes up all the same, and is refused again
    machine.wait_for(lambda: log.read_text().count("(revoked)") >= 2, "another refusal", 60.0, node.logs)
    assert json.loads(cli(node, "status", "--json").stdout)["lines"]["agent"]["answers"]
