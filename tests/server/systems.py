"""System bundles for a played fleet, and what its nodes say of their slots."""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from instar_server.trust import bundle as bundles
from instar_server.trust.pack import Release
from tests.node.boot.test_disks import image
from tests.server.test_history import event, send
from tests.server.world import WITHIN_S, Node, World

BOARD = "board-7"


def make_bundle(
    folder: Path, name: str = "web", version: str = "1.1.0", size: int = 300_000, **about: Any
) -> tuple[Path, bundles.Built]:
    """A small one, of bytes that cannot be made smaller."""
    root, kernel, out = folder / "root", folder / "kernel", folder / f"{name}-{version}.bundle"
    root.write_bytes(os.urandom(size))
    kernel.write_bytes(image({".linux": os.urandom(5000), ".initrd": b"i" * 5000, ".cmdline": b"quiet"}))
    said = {"compatible": (BOARD,), "arch": "x86_64", **about}
    return out, bundles.build(bundles.About(name, version, **said), root, kernel, out)


def publish(world: World, version: str = "1.1.0", name: str = "web", **about: Any) -> Release:
    """A signed bundle."""
    with tempfile.TemporaryDirectory() as folder:
        path, built = make_bundle(Path(folder), name, version, **about)
        return publish_file(world, path, built.custom)


def publish_file(world: World, path: Path, custom: dict[str, Any]) -> Release:
    data = path.read_bytes()
    target = f"os/{custom['name']}-{custom['version']}.bundle"
    release = Release(target, data, hashlib.sha256(data).hexdigest(), custom)
    world.operator._sign(release)
    world._upload(release)
    return release


def slot(version: str = "1.0.0", digest: str = "a" * 96, state: str = "good", **more: Any) -> dict[str, Any]:
    base = {
        "version": version, "digest": digest, "state": state, "size": 300_000, "done": 300_000, "since": 1.5e9,
        "why": "", "booted_by": "firmware", "cold_boot_seen": True,
    }  # fmt: skip
    return {**base, **more}


def report(**changes: Any) -> dict[str, Any]:
    """What a node with two slots says."""
    base = {
        "v": 1, "running": "a", "hardware": [BOARD, "virtual"], "arch": "x86_64", "backend": "firmware",
        "slots": {"a": slot(), "b": slot(version="", digest="", state="unknown", booted_by="")},
        "boot": {"order": ["a", "b"], "once": "", "tries": {}, "drift": []}, "update": None,
    }  # fmt: skip
    return {**base, **changes}


def at_work(tx: str, generation: int, step: str = "stage", **more: Any) -> dict[str, Any]:
    base = {
        "tx": tx, "generation": generation, "step": step, "slot": "b", "done": 100_000, "total": 300_000,
        "fetched": 60_000, "reused": 40_000,
    }  # fmt: skip
    return {**base, **more}


def tell(node: Node, body: dict[str, Any] | None = None, **changes: Any) -> httpx.Response:
    with node.http() as http:
        return http.post("/v1/node/system", json=body if body is not None else report(**changes))


def new_node(world: World, **changes: Any) -> Node:
    """A node that has told of its slots."""
    node = world.new_node()
    assert tell(node, **changes).status_code == 200
    return node


def order(world: World, node: Node | str, status: int = 202, **changes: Any) -> Any:
    body = {"bundle": "web-1.1.0", "activation": "reboot", **changes}
    body = {name: value for name, value in body.items() if value is not ...}
    id_ = node if isinstance(node, str) else node.id
    return world.ask("POST", f"/nodes/{id_}/update-os", status, json=body)


def view(world: World, node: Node) -> dict[str, Any]:
    found: dict[str, Any] = world.ask("GET", f"/nodes/{node.id}/system")
    return found


def wanted(node: Node) -> dict[str, Any]:
    with node.http() as http:
        found: dict[str, Any] = http.get("/v1/node/wanted").json()
    return found


def say(node: Node, tx: str, generation: int, *phases: str, **more: Any) -> None:
    """The node's events of a transaction of line os; the numbers go on from `first` (1)."""
    first = more.pop("first", 1)
    last = more.pop("reason", {"code": "", "text": ""})
    events = []
    for n, phase in enumerate(phases):
        reason = last if n == len(phases) - 1 else {"code": "", "text": ""}
        said = {
            "line": "os",
            "generation": generation,
            "slot": "b",
            "mode": "reboot",
            "digest": "",  # of what was ordered, whatever that is
            "reason": reason,
            **more,
        }
        events.append(event(tx, first + n, phase, **said))
    answer = send(node, *events)
    assert answer.status_code == 200, answer.text


async def eventually(check: Callable[[], bool], within_s: float = WITHIN_S) -> None:
    until = time.monotonic() + within_s
    while not await asyncio.to_thread(check):
        assert time.monotonic() < until
        await asyncio.sleep(0.05)
