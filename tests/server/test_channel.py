"""The control channel: identity, frames, replacement, revocation."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from instar.wire.messages import MAX_FRAME
from tests.server.world import WITHIN_S, Channel, World, running


async def eventually(check: Any, within_s: float = WITHIN_S) -> None:
    """Wait until `check()` is true."""
    loop = asyncio.get_running_loop()
    until = loop.time() + within_s
    while not await asyncio.to_thread(check):
        assert loop.time() < until, "it never came true"
        await asyncio.sleep(0.05)


@pytest.fixture
async def channel(world: World) -> AsyncIterator[Channel]:
    node = await asyncio.to_thread(world.new_node)
    async with node.connected() as found:
        yield found


async def alive(channel: Channel) -> bool:
    await channel.send("ping", n=77)
    return await channel.read_type("pong") == {"t": "pong", "n": 77}


async def test_hello_is_welcomed_and_the_live_state_shows(world: World, channel: Channel) -> None:
    seen = await asyncio.to_thread(world.node, channel.node.id)
    assert seen["state"] == "connected"
    assert seen["agent"]["version"] == "1.0.0"
    await eventually(lambda: world.node(channel.node.id)["os"] == "test")  # it is written in batches
    await channel.send("health", ok=False, modules={"a": "failed"}, facts={"load": 1})
    await eventually(lambda: world.node(channel.node.id)["health"].get("modules") == {"a": "failed"})
    await channel.ws.close()
    await eventually(lambda: world.node(channel.node.id)["state"] == "offline")


async def test_when_its_program_was_built_is_remembered(world: World) -> None:
    node = await asyncio.to_thread(world.new_node)
    assert (await asyncio.to_thread(world.node, node.id))["built"] == ""
    async with node.connected(built="2026-11-21T16:36:04Z"):
        assert (await asyncio.to_thread(world.node, node.id))["built"] == "2026-11-21T16:36:04Z"
    await eventually(lambda: world.node(node.id)["state"] == "offline")
    assert (await asyncio.to_thread(world.node, node.id))["built"] == "2026-11-21T16:36:04Z"


async def test_a_hello_for_another_node_is_refused(world: World) -> None:
    node, other = await asyncio.to_thread(world.new_node), await asyncio.to_thread(world.new_node)
    async with other.connected() as victim:
        async with node.channel() as channel:
            await channel.hello(node=other.id)
            refused = await channel.read()
            assert (refused["t"], refused["code"]) == ("refused", "identity-mismatch")
            assert (await channel.read())["t"] == "closed"
        assert await alive(victim)


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("v", 2, "unsupported-version"),
        ("role", "king", "bad-role"),
        ("version", "../1", "bad-version"),
        ("digest", "abc", "bad-digest"),
        ("tx", "a/b", "bad-tx"),
        ("python", "x" * 100, "bad-hello"),
    ],
)
async def test_a_hello_with_a_bad_field_is_refused(world: World, field: str, value: Any, code: str) -> None:
    node = await asyncio.to_thread(world.new_node)
    async with node.channel() as channel:
        await channel.hello(**{field: value})
        refused = await channel.read()
        assert (refused["t"], refused["code"]) == ("refused", code)


BAD_FRAMES = [
    ("", "bad-frame"),
    ("{", "bad-frame"),
    ("[]", "bad-frame"),
    ("null", "bad-frame"),
    ('{"t":7}', "bad-frame"),
    ('{"t":"ping","n":"x"}', "bad-frame"),
    ('{"t":"result","id":"x"}', "bad-frame"),
    ('{"t":"health","ok":true,"facts":{"a":1e999}}', "bad-frame"),
    ('{"t":"ping","n":' + "[" * 50_000, "bad-frame"),
    ('{"t":"ping","x":"\\ud800"}', "bad-frame"),
    ('{"t":"dance"}', "unknown-type"),
    ('{"t":"welcome"}', "unexpected-type"),
    ('{"t":"ping","pad":"' + "x" * MAX_FRAME + '"}', "frame-too-large"),
]


@pytest.mark.parametrize(("frame", "code"), BAD_FRAMES, ids=range(len(BAD_FRAMES)))
async def test_a_bad_frame_is_named_and_the_channel_stays(channel: Channel, frame: str, code: str) -> None:
    await channel.ws.send_str(frame)
    error = await channel.read_type("error")
    assert error["code"] == code
    assert await alive(channel)


async def test_more_bad_frames(channel: Channel) -> None:
    await channel.ws.send_bytes(b'{"t":"ping"}')
    assert (await channel.read_type("error"))["code"] == "bad-frame"
    await channel.hello()
    assert (await channel.read_type("error"))["code"] == "unexpected-message"
    await channel.send("result", id="j-nobody", ok=True)
    assert (await channel.read_type("error"))["code"] == "unknown-job"
    assert (await channel.read_type("ack"))["id"] == "j-nobody"
    await channel.send("health", ok=True, facts={"x": "y" * 20_000})
    assert (await channel.read_type("error"))["code"] == "health-too-large"
    await channel.send("error", code="x", message="y")
    assert await alive(channel)


async def test_a_frame_far_over_the_limit_ends_only_its_own_channel(world: World, channel: Channel) -> None:
    other = await asyncio.to_thread(world.new_node)
    async with other.connected() as bystander:
        await channel.ws.send_str("x" * (3 * MAX_FRAME))
        assert (await channel.read())["t"] == "closed"  # 1009, unless the cut overtakes it
        assert await alive(bystander)


async def test_a_thousand_mutations_leave_the_channel_up(channel: Channel) -> None:
    chance = random.Random(7)
    good = [
        {"t": "ping", "n": 3},
        {"t": "health", "ok": True, "modules": {"a": "ok"}, "facts": {"b": [1, None]}},
        {"t": "result", "id": "j-1", "ok": True, "reply": {"x": 1}, "seconds": 0.5, "stderr": "é"},
        {"t": "taken", "id": "j-1"},
        {"t": "output", "id": "j-1", "seq": 1, "kind": "progress", "text": "half", "fraction": 0.5},
        {
            "t": "command-status",
            "id": "j-1",
            "type": "restart-agent",
            "status": "success",
            "modules": {"a": "x"},
        },
        {"t": "update-have", "id": "u-1", "digest": "ab", "have": 1, "block": 1024, "window": 2},
        {"t": "update-ack", "id": "u-1", "n": 3},
        {"t": "update-state", "id": "u-1", "state": "failed", "code": "x"},
        {"t": "agentupdate-progress", "id": "r-1", "phase": "fetch", "percent": 7.5},
        {"t": "agentupdatedownloaded", "id": "r-1", "sha384": "ab"},
        {"t": "agentupdate-ended", "id": "r-1", "ok": True},
    ]
    for _ in range(1000):
        text = list(json.dumps(chance.choice(good)))
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(text))
            text[place : place + chance.randint(0, 2)] = chance.choice(
                ['"', "{", "}", "9", "\\u00", "x", ",", "\x00"]
            )
        await channel.ws.send_str("".join(text))
    for n in (424242, 77):  # what came of the last results may be told after the first pong
        await channel.send("ping", n=n)
        while (frame := await channel.read()) != {"t": "pong", "n": n}:
            assert frame["t"] in ("error", "pong", "ack"), frame


async def test_before_the_hello_nothing_else_is_heard(world: World) -> None:
    node = await asyncio.to_thread(world.new_node)
    async with node.channel() as channel:
        await channel.send("ping")
        assert (await channel.read())["code"] == "hello-expected"
        await channel.hello()
        assert (await channel.read())["t"] == "welcome"


async def test_the_newer_channel_takes_the_place_of_the_older(world: World, channel: Channel) -> None:
    async with channel.node.connected() as newer:
        refused = await channel.read_type("refused")
        assert refused["code"] == "replaced"
        assert await alive(newer)
    await eventually(lambda: world.node(channel.node.id)["state"] == "offline")


async def test_revoking_a_node_ends_its_channel_and_every_request(world: World, channel: Channel) -> None:
    node = channel.node
    with node.http() as http:
        assert (await asyncio.to_thread(http.get, "/v1/node/wanted")).status_code == 200
        with world.api() as api:
            answer = await asyncio.to_thread(api.post, f"/nodes/{node.id}/revoke", json={"why": "stolen"})
        assert answer.status_code == 200
        assert (await channel.read_type("refused"))["code"] == "revoked"
        assert (await channel.read())["t"] == "closed"
        again = await asyncio.to_thread(http.get, "/v1/node/wanted")  # the same, kept connection
        assert (again.status_code, again.json()["error"]["code"]) == (403, "revoked")
    with node.http() as http:
        fresh = await asyncio.to_thread(http.get, "/v1/metadata/timestamp.json")
        assert fresh.json()["error"]["code"] == "revoked"
    with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
        async with node.channel():
            pass
    assert refusal.value.status == 403
    assert (await asyncio.to_thread(world.node, node.id))["state"] == "revoked"


async def test_revoking_one_certificate_leaves_the_others(world: World) -> None:
    from tests.server.world import make_csr

    node = await asyncio.to_thread(world.new_node)
    with node.http() as http, world.api() as api:
        renewed = (
            await asyncio.to_thread(http.post, "/v1/renew", json={"v": 1, "csr": make_csr(node.key)})
        ).json()
        assert api.post(f"/certificates/{node.serial}/revoke").status_code == 200
        assert api.post(f"/certificates/{node.serial}/revoke").status_code == 409
        assert http.get("/v1/node/wanted").json()["error"]["code"] == "revoked"
    (node.folder / "cert.pem").write_text(renewed["certificate"])
    async with node.connected() as channel:
        assert await alive(channel)


@pytest.fixture
def brisk(tmp_path: Path) -> Iterator[World]:
    with running(tmp_path, ping_s=1.0) as world:
        yield world


async def test_a_silent_node_is_noticed(brisk: World) -> None:
    """After 2.5 times `ping_s` without a frame the channel is cut."""
    node = await asyncio.to_thread(brisk.new_node)
    async with node.connected() as channel:
        assert (await channel.read())["t"] == "closed"
        await eventually(lambda: brisk.node(node.id)["state"] == "offline")


async def test_a_resumed_handshake_is_no_way_around_a_revocation(world: World) -> None:
    node = await asyncio.to_thread(world.new_node)
    context = node.context()

    def wanted(session: ssl.SSLSession | None) -> tuple[int, bool, ssl.SSLSession | None]:
        """Status, whether the handshake was a resumed one, and what to resume it with."""
        raw = socket.create_connection(("127.0.0.1", world.ports["gateway_port"]), 10)
        with context.wrap_socket(raw, server_hostname="127.0.0.1", session=session) as secured:
            secured.sendall(b"GET /v1/node/wanted HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answer = b""
            while part := secured.recv(65_536):
                answer += part
            return int(answer.split(b" ", 2)[1]), bool(secured.session_reused), secured.session

    status, resumed, session = await asyncio.to_thread(wanted, None)
    assert (status, resumed) == (200, False)
    status, resumed, session = await asyncio.to_thread(wanted, session)
    assert (status, resumed) == (200, True)
    with world.api() as api:
        assert api.post(f"/nodes/{node.id}/revoke", json={}).status_code == 200
    status, resumed, _ = await asyncio.to_thread(wanted, session)
    assert (status, resumed) == (403, True)
