"""`instar.pyz verify` as the updater runs it: the built program, a key made by the node, mTLS, real HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.trust.gateway import Gateway
from tests.trust.world import PATH, World


def verify(pyz: Path, world: World, target: str = PATH, *more: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-I", "-S", str(pyz), "verify", "--state", str(world.trust.parent)]
    done = subprocess.run(
        [*command, "--target", target, *more],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": os.environ["PATH"]},
    )
    [line] = done.stdout.splitlines()
    return done.returncode, json.loads(line)


def test_the_child_verifies_over_mtls(pyz: Path, world: World, gateway: Gateway) -> None:
    status, answer = verify(pyz, world)
    [target] = world.repository.targets()
    assert status == 0
    assert answer == {
        "ok": True,
        "target": {
            "path": PATH,
            "length": target.length,
            "hashes": {"sha256": target.sha256},
            "custom": target.custom,
        },
        "versions": {"root": 1, "timestamp": 1, "snapshot": 1, "targets": 2},
        "url_path": f"targets/node/{target.sha256}.instar-1.1.0.tar.gz",
        "dropped": [],
    }
    role, version, digest = gateway.headers_seen[0].split(" ")
    assert (role, version, len(digest)) == ("updater", "1.0.0", 96)
    name, timestamp = world.current("timestamp")
    world.tamper = {name: timestamp.replace(b'"version":1}', b'"version":2}')}
    status, answer = verify(pyz, world)
    assert (status, answer["kind"], answer["error"]["code"]) == (3, "trust", "bad-signature")
    world.tamper = {}
    status, answer = verify(pyz, world, "node/none.tar.gz")
    assert (status, answer["kind"], answer["error"]["code"]) == (3, "absent", "no-such-target")


def test_the_next_server_is_tried_when_one_is_away(pyz: Path, world: World, gateway: Gateway) -> None:
    here = f"https://127.0.0.1:{gateway.server_address[1]}"
    away = "https://127.0.0.1:1"
    assert verify(pyz, world, PATH, "--server", away, "--server", here)[0] == 0
    status, answer = verify(pyz, world, PATH, "--server", away)
    assert (status, answer["kind"], answer["error"]["code"]) == (5, "unreachable", "server-unreachable")
