"""How the recordings in this folder were made. Kept to be read: a recording is never made again.

    python -m tests.frozen.making FOLDER

The node is real, the server is played, and speaks as docs/protocol.md says ('The frozen part'). The recovery
core in them is a stand-in of a few lines that holds the node to the core's command line and order file;
its metadata last until the year 2999, since they must be good whenever a recording is replayed.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import shutil
import sys
import tempfile
import zipfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from instar.core.errors import InputError
from instar.trust.program import program_digest
from instar.wire.messages import (
    AgentUpdate,
    Error,
    Ping,
    Pong,
    Refused,
    UpdateHave,
    UpdateOffer,
)
from instar_lab.program import build
from instar_server.trust.pack import Release, pack_recovery
from tests.agent.fleet import Authority
from tests.recovery.gateway import Gateway, Recorded, deliver, follow, offer_of, parcel
from tests.recovery.place import Place
from tests.trust.world import World, signer

FAR = datetime(2999, 1, 1, tzinfo=UTC)
ROLES = ("root", "targets", "snapshot", "timestamp")
VERSION = "1.0.0"

CORE = '''\
"""A stand-in for a recovery core, as of protocol version 1. It never changes."""

import json
import os
import sys

FIELDS = {"v", "id", "url", "sha384", "version", "digest", "target", "lines", "pin"}


def say(**words):
    os.write(1, json.dumps(words).encode() + b"\\n")


def main(words):
    if len(words) != 4 or words[0] != "--state" or words[2] != "--order" or not os.path.isdir(words[1]):
        say(ended={"ok": False, "code": "usage", "text": " ".join(words)})
        return 2
    with open(words[3]) as file:
        order = json.load(file)
    if order["v"] != 1 or not FIELDS <= set(order) or len(order["pin"]) != 64:
        say(ended={"ok": False, "code": "bad-order", "text": json.dumps(order)})
        return 2
    say(progress={"phase": "verify", "percent": -1, "text": ""})
    say(progress={"phase": "fetch", "percent": 50.0, "text": order["url"]})
    say(progress={"phase": "fetch", "percent": 100.0, "text": ""})
    say(downloaded=order["sha384"])
    say(progress={"phase": "agent:trial", "percent": -1, "text": ",".join(order["lines"])})
    if order["id"].endswith("-fails"):
        say(ended={"ok": False, "code": "bad-hash", "text": "as it was told"})
        return 3
    say(ended={"ok": True, "code": "", "text": ""})
    return 0


sys.exit(main(sys.argv[1:]))
'''


class FrozenWorld:
    """TUF metadata for one recovery core, good for a long time. What `parcel` asks of a World."""

    def __init__(self, core: Release) -> None:
        keys = {role: signer() for role in ROLES}
        root = Root(expires=FAR, consistent_snapshot=True)
        for role, key in keys.items():
            root.add_key(key.public_key, role)
        listed = TargetFile(len(core.archive), {"sha256": core.sha256}, core.path, {"custom": core.custom})
        signed: dict[str, Any] = {
            "root": root,
            "targets": Targets(expires=FAR, targets={core.path: listed}),
            "snapshot": Snapshot(expires=FAR, meta={"targets.json": MetaFile(1)}),
        }
        self.files: dict[str, bytes] = {}
        for role in ("root", "targets", "snapshot", "timestamp"):
            if role == "timestamp":
                data = self.files["1.snapshot.json"]
                meta = MetaFile(1, len(data), {"sha256": hashlib.sha256(data).hexdigest()})
                signed[role] = Timestamp(expires=FAR, snapshot_meta=meta)
            metadata: Metadata[Any] = Metadata(signed[role])
            metadata.sign(keys[role])
            name = "timestamp.json" if role == "timestamp" else f"1.{role}.json"
            self.files[name] = metadata.to_bytes()

    def served(self) -> dict[str, bytes]:
        return self.files

    def current(self, role: str) -> tuple[str, bytes]:
        return f"1.{role}.json", self.files[f"1.{role}.json"]


def core_release() -> Release:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("__main__.py"), CORE)
    release = pack_recovery(file.getvalue(), VERSION)
    if release.digest != program_digest(file.getvalue()):
        raise InputError("bad-core", "the stand-in is not what it should be")
    return release


async def converse(connection: Recorded, world: FrozenWorld, core: Release) -> None:
    """All of the frozen part, one after the other."""
    data = parcel(world, core, "recovery")  # type: ignore[arg-type]
    offer = offer_of(core, data, block=4096, window=2)
    await connection.send(Ping(1))
    await connection.until(Pong)
    await connection.send_raw('{"t":"from-the-future","with":"more"}')
    connection.frames.append(("server", '{"t":"from-the-future","with":"more"}'))
    await connection.until(Error)
    await deliver(connection, offer, data)
    await deliver(connection, replace(offer, id="u-2"), data)  # it is whole already
    short = UpdateOffer("u-3", "recovery", VERSION, core.digest, core.path, 5000, "ab" * 48, 4096, 2)
    await deliver(connection, short, b"x" * 5000)  # its bytes are not what was offered
    order = AgentUpdate(
        "r-1-fails", "/v1/targets/node/ab.instar-1.1.0.tar.gz", "cd" * 48, "1.1.0", "ef" * 48,
        "node/instar-1.1.0.tar.gz", offer.sha384, ["agent", "updater"],
    )  # fmt: skip
    await connection.send(replace(order, id="r-0", core="12" * 48))  # a core that is not here
    await follow(connection)
    await connection.send(order)
    await follow(connection)
    await connection.send(replace(order, id="r-2", lines=["agent"]))
    await follow(connection)


async def native(connection: Recorded, world: FrozenWorld, core: Release) -> None:
    """What only a beacon says: it takes no native update."""
    data = parcel(world, core, "recovery")  # type: ignore[arg-type]
    await connection.send(replace(offer_of(core, data), id="u-9", line="agent"))
    await connection.until(UpdateHave)


async def record(role: str, world: FrozenWorld, core: Release) -> list[tuple[str, str]]:
    folder = Path(tempfile.mkdtemp(prefix="instar-rec-", dir="/tmp"))
    gateway = Gateway(folder, Authority(), World(folder))
    await gateway.start()
    place = Place(folder / "state", gateway)
    try:
        place.install(build.build(VERSION))
        (place.layout.trust / "pinned-root.json").write_bytes(world.files["1.root.json"])
        if role == "beacon":
            place.delete("agent")
        place.launch()
        connection = await gateway.call(role)
        assert gateway.welcome is not None
        if role == "beacon":
            await native(connection, world, core)
        await converse(connection, world, core)
        if role == "agent":
            await connection.send(Refused("moved", "come back later", 1.0))
            await connection.gone()
        return connection.frames
    finally:
        place.end()
        await gateway.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main(into: Path) -> None:
    core = core_release()
    world = FrozenWorld(core)
    (into / "pinned-root.json").write_bytes(world.files["1.root.json"])
    for role in ("agent", "beacon"):
        frames = asyncio.run(record(role, world, core))
        about = {"about": f"a real {role} of Instar {VERSION}, protocol version 1, and a played server"}
        lines = [json.dumps(about), *(json.dumps({"from": who, "frame": text}) for who, text in frames)]
        (into / f"{role}-1.0.0.jsonl").write_text("\n".join(lines) + "\n")
        print(role, len(frames), "frames")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
