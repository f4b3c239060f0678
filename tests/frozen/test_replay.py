"""Recorded conversations of the protocol's frozen part, replayed for ever (docs/protocol.md, 'The frozen part').

Each line of a `.jsonl` is {"from": "node" | "server", "frame": "<the text frame as it was>"}. What a server of
version 1.0.0 said is said again to the node of today, byte for byte, and what a node of version 1.0.0 said to
the server of today. A test here that fails means that old nodes or old servers are cut off: it is never
the recording that is to be changed. A recording of a new release may be added beside the old ones.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from instar.core.errors import InputError
from instar.wire.codec import decode, encode
from instar_lab.program import build
from instar_server.gateway import frames as gateway_frames
from tests.agent.fleet import Authority
from tests.frozen.making import core_release
from tests.recovery.gateway import Gateway, Recorded
from tests.recovery.place import Place
from tests.server.world import Channel, Node, running
from tests.server.world import World as Server
from tests.trust.world import World

HERE = Path(__file__).parent
ALL = sorted(HERE.glob("*.jsonl"))
PLAYED = [path for path in ALL if "-and-server-" not in path.name]  # the node is real, the server was played
REAL = [path for path in ALL if "-and-server-" in path.name]  # both are real, blocks without their data
FROZEN = (
    "hello", "welcome", "refused", "ping", "pong", "error",
    "update-offer", "update-have", "update-block", "update-ack", "update-end", "update-state",
    "agentupdate", "agentupdate-progress", "agentupdatedownloaded", "agentupdate-ended",
)  # fmt: skip
UNKNOWN = "from-the-future"  # a type that nobody has

# Words for people, and what each node says of itself: free to change. Everything else is not.
FREE: dict[str, set[str]] = {
    "hello": {"version", "digest", "boot_id", "pid", "started", "os", "arch", "python", "built", "features"},
    "error": {"message"},
    "update-state": {"text"},
    "agentupdate-ended": {"text"},
}
BETWEEN = ("ping", "health", "agentupdate-progress", "update-ack")  # may come more often than it did
WITHIN_S = 60.0

Frame = tuple[str, str]  # who, and the text


def recorded(path: Path) -> list[Frame]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["from"], line["frame"]) for line in lines if "frame" in line]


def is_like(now: dict[str, Any], then: dict[str, Any]) -> bool:
    """Whether a frame of today says what the recorded one said. New fields are allowed."""
    free = FREE.get(then["t"], set())
    return all(name in now and (name in free or now[name] == value) for name, value in then.items())


def test_the_recordings_are_here() -> None:
    assert {path.name for path in ALL} >= {
        "agent-1.0.0.jsonl", "beacon-1.0.0.jsonl", "agent-and-server-1.0.0.jsonl", "beacon-and-server-1.0.0.jsonl",
    }  # fmt: skip
    said = {json.loads(text)["t"] for path in ALL for _, text in recorded(path)}
    assert set(FROZEN) <= said


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_frame_is_read_by_both_sides(path: Path) -> None:
    for who, text in recorded(path):
        then = json.loads(text)
        if then["t"] == UNKNOWN:
            with pytest.raises(InputError) as refused:
                decode(text)
            assert refused.value.code == "unknown-type"
            continue
        assert is_like(json.loads(encode(decode(text))), then)
        if who == "node":
            assert is_like(json.loads(gateway_frames.encode(gateway_frames.decode(text.encode()))), then)


# --- the node of today


@pytest.fixture(scope="module")
def program() -> build.Program:
    return build.build("7.7.7")


@pytest.fixture
async def place(program: build.Program) -> AsyncIterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="instar-frz-", dir="/tmp"))
    gateway = Gateway(folder, Authority(), World(folder))
    await gateway.start()
    made = Place(folder / "state", gateway)
    made.install(program)
    (made.layout.trust / "pinned-root.json").write_bytes((HERE / "pinned-root.json").read_bytes())
    yield made
    made.end()
    await gateway.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("path", PLAYED, ids=lambda path: path.stem)
async def test_the_node_of_today_understands_the_server_of_then(place: Place, path: Path) -> None:
    frames = recorded(path)
    (_, hello), (_, welcome), *rest = frames
    role = json.loads(hello)["role"]
    if role == "beacon":
        place.delete("agent")
    place.gateway.welcome = decode(welcome)  # type: ignore[assignment]
    place.launch()
    connection = await place.gateway.call(role)
    now = json.loads(encode(connection.hello))
    assert is_like(now, json.loads(hello)), now
    for who, text in rest:
        if who == "server":
            await connection.send_raw(text)
        elif json.loads(text)["t"] not in BETWEEN[:2]:
            await says(connection, json.loads(text), place)


async def says(connection: Recorded, then: dict[str, Any], place: Place) -> None:
    """The node says what it said then; what may come more often is passed over."""
    while True:
        message = await connection.next(WITHIN_S)
        assert message is not None, f"it went away instead of saying {then}\n{place.logs()}"
        now = json.loads(encode(message))
        if is_like(now, then):
            return
        assert now["t"] in BETWEEN, f"{then}\nwas said then, now it is\n{now}\n{place.logs()}"


# --- the server of today


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("frozen"), ping_s=5.0) as made:
        made.publish("1.0.0")
        made.operator._sign(core_release())
        made._upload(core_release())
        yield made


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
async def test_the_server_of_today_understands_the_node_of_then(server: Server, path: Path) -> None:
    """The node's frames, byte for byte but for what the server of today has named otherwise: ids, digests."""
    node = await asyncio.to_thread(server.new_node)
    async with node.channel() as channel:
        replay = Replay(channel, node)
        for who, text in recorded(path):
            then = json.loads(text)
            if who == "node":
                await replay.say(then)
            else:
                await replay.hear(then)
            if then["t"] == "welcome" and path.name.startswith("agent"):
                body = {"version": "1.0.0", "lines": ["agent"]}
                await asyncio.to_thread(server.ask, "POST", f"/nodes/{node.id}/recover", json=body)
        await channel.send("ping", n=99)
        while (frame := await channel.read())["t"] != "pong":
            assert frame["t"] not in ("error", "refused", "closed"), frame
        ends: list[str] = []
        async with asyncio.timeout(WITHIN_S):
            while not ends:
                history = await asyncio.to_thread(server.history, node.id)
                phases = [entry["phase"] for entry in history]
                ends = [phase for phase in phases if phase in ("recovery-ended", "recovery-failed")]
        assert ends == ["recovery-ended"], history


class Replay:
    """One node of then. What the server of then had chosen is replaced by what that of now has chosen."""

    def __init__(self, channel: Channel, node: Node) -> None:
        self.channel = channel
        self.names: dict[str, str] = {}
        self.node = node.id

    async def say(self, then: dict[str, Any]) -> None:
        text = json.dumps({**then, "node": self.node} if then["t"] == "hello" else then)
        for old, new in self.names.items():
            text = text.replace(old, new)
        await self.channel.ws.send_str(text)

    async def hear(self, then: dict[str, Any]) -> None:
        """The same type with the same fields; the values are today's."""
        while (now := await self.channel.read(WITHIN_S))["t"] in ("look", "ping"):
            continue
        assert now["t"] == then["t"], f"{then}\nwas said then, now it is\n{now}"
        assert set(then) <= set(now), now
        for name in ("id", "sha384", "url"):
            if isinstance(then.get(name), str):
                self.names[then[name]] = now[name]
        for name, value in then.items():
            assert type(now[name]) is type(value), (name, now)
