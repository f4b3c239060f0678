"""Random lines on the agent's local socket: each is answered or cut off, and nothing grows.

The wake-up port's 100,000 connections are in tests/agent/test_poke.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
from pathlib import Path

import pytest

from instar_lab import machine
from instar_lab.node import Node
from tests.e2e.conftest import Stage, health

GROWTH_KIB = 1024
WORDS = [
    "do",
    "v",
    "restart",
    "command",
    "modules",
    "status",
    "health",
    "look",
    "reload-module",
    "module",
    "id",
    "within_s",
]


def value(chance: random.Random, depth: int = 0) -> object:
    kind = chance.randrange(8 if depth < 4 else 5)
    if kind == 0:
        return chance.choice(WORDS)
    if kind == 1:
        return chance.choice([0, 1, -1, 2**63, 1e308, -0.5, True, False, None])
    if kind == 2:
        return "".join(chr(chance.randrange(1, 0x2FF)) for _ in range(chance.randrange(40)))
    if kind in (3, 4):
        return chance.choice(["../../etc", "a" * 300, "lab.memory", "c-0123456789ab", "", "\ud800"])
    if kind == 5:
        return [value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice(WORDS): value(chance, depth + 1) for _ in range(chance.randrange(5))}


def line(chance: random.Random) -> bytes:
    """Random bytes, broken JSON, or a request with random parts. Never one that would restart anything."""
    kind = chance.randrange(4)
    if kind == 0:
        return os.urandom(chance.randrange(1, 200)).replace(b"\n", b"")
    if kind == 1:
        whole = json.dumps(value(chance)).encode()
        return whole[: chance.randrange(len(whole) + 1)]
    request = {"v": chance.choice([1, 1, 1, 2, "1", None]), "do": chance.choice([*WORDS, value(chance)])}
    request |= {chance.choice(WORDS[5:]): value(chance) for _ in range(3)}
    if request["do"] in ("restart", "look"):
        request["v"] = 9
    return json.dumps(request).encode()


def rss_kib(pid: int) -> int:
    return machine.rss(pid) // 1024


def fuzz(node: Node, count: int, seed: int) -> int:
    """Send `count` lines over many connections. How many were answered."""
    chance, answered, left = random.Random(seed), 0, count
    path = str(node.layout.socket("agent"))
    while left > 0:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, contextlib.suppress(OSError):
            client.settimeout(60.0)
            client.connect(path)
            batch = [line(chance) for _ in range(min(left, chance.randrange(1, 200)))]
            left -= len(batch)
            for each in batch:
                client.sendall(each + b"\n")
                if not each.strip():
                    continue
                reply = client.makefile("rb").readline()
                if not reply:
                    break
                assert isinstance(json.loads(reply)["ok"], bool)
                answered += 1
    return answered


def flat(stage: Stage, count: int) -> None:
    node = stage.node()
    pid = node.pid("agent")
    assert pid
    fuzz(node, 2000, 1)  # whatever is loaded at the first use is loaded now
    before, descriptors = rss_kib(pid), len(list(Path(f"/proc/{pid}/fd").iterdir()))
    answered = fuzz(node, count, 2)
    print(f"{count} lines, {answered} answered, {rss_kib(pid) - before} KiB more")
    assert answered > count // 2
    assert node.pid("agent") == pid
    assert health(node)["connected"]
    assert rss_kib(pid) - before < GROWTH_KIB
    assert len(list(Path(f"/proc/{pid}/fd").iterdir())) <= descriptors + 1


def test_random_lines_leave_the_agent_as_it_was(stage: Stage) -> None:
    flat(stage, 5_000)


@pytest.mark.slow
def test_a_hundred_thousand_random_lines(stage: Stage) -> None:
    flat(stage, 100_000)
