"""Recoveries: a core is sent, told what to fetch, and listened to; beacons; artifacts on a port of their own."""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server import taking
from tests.server.test_channel import alive, eventually
from tests.server.test_history import event, send
from tests.server.test_transfers import ask_wanted, own_world, want
from tests.server.world import Channel, Node, World, running


@pytest.fixture(scope="module")
def rescuing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("rescuing"), ping_s=30.0, wrong_tokens=1000) as world:
        for version in ("1.0.0", "1.1.0", "1.2.0"):
            world.publish(version)
        for version in ("0.9.0", "1.10.0", "1.9.0"):
            world.publish_core(version)
        yield world


@pytest.fixture
async def node(rescuing: World) -> Node:
    return await asyncio.to_thread(rescuing.new_node, f"g{os.urandom(4).hex()}")


def digest(world: World, version: str) -> str:
    return str(world.operator.releases[version].custom["program_digest"])


async def phases(node: Node) -> list[tuple[str, str]]:
    """What the server noted about recoveries, oldest first, with its code."""
    entries = await asyncio.to_thread(node.world.history, node.id)
    found = [(each["phase"], each["reason_code"]) for each in reversed(entries)]
    return [each for each in found if each[0].startswith("recovery-")]


async def recover(node: Node, status: int = 200, **body: Any) -> dict[str, Any]:
    path = f"/nodes/{node.id}/recover"
    found: dict[str, Any] = await asyncio.to_thread(node.world.ask, "POST", path, status, json=body)
    return found


async def order(channel: Channel) -> tuple[taking.Taken, dict[str, Any]]:
    """Take the core, then hear what to do with it."""
    taken = await taking.take(channel)
    return taken, await channel.read_type("agentupdate")


async def test_a_core_is_sent_and_told_what_to_fetch(rescuing: World, node: Node) -> None:
    async with node.connected() as channel:
        await recover(node, version="1.1.0", lines=["agent"])
        taken, told = await order(channel)
        core = rescuing.operator.cores["1.10.0"]
        assert taken.offer["line"] == "recovery"
        assert taken.said == {
            "format": 1, "kind": "recovery", "version": "1.10.0", "digest": core.custom["digest"],
            "target": "recovery/core-1.10.0.pyz", "length": len(core.archive), "sha256": core.sha256,
        }  # fmt: skip
        assert taken.members["archive"] == core.archive
        release = rescuing.operator.releases["1.1.0"]
        assert told == {
            "t": "agentupdate", "id": told["id"], "version": "1.1.0", "digest": digest(rescuing, "1.1.0"),
            "url": f"/v1/targets/node/{release.sha256}.instar-1.1.0.tar.gz", "target": release.path,
            "sha384": hashlib.sha384(release.archive).hexdigest(), "core": taken.offer["sha384"],
            "lines": ["agent"],
        }  # fmt: skip
        with node.http() as http:
            assert (await asyncio.to_thread(http.get, told["url"])).content == release.archive
        await channel.send("agentupdate-progress", id=told["id"], phase="fetch", percent=40.5, text="so far")
        await eventually(lambda: rescuing.ask("GET", f"/nodes/{node.id}/transfer")["percent"] == 40.5)
        view = await taking.transfer(rescuing, node.id)
        assert (view["state"], view["phase"], view["core"], view["via"]) == (
            "installing", "fetch", "1.10.0", "recovery",
        )  # fmt: skip
        await channel.send("agentupdatedownloaded", id=told["id"], sha384=told["sha384"])
        await channel.send("agentupdate-ended", id=told["id"], ok=True, text="done")
        view = await taking.state(rescuing, node.id, "done")
        assert (view["version"], view["ended"] is not None) == ("1.1.0", True)
    await eventually(lambda: len(rescuing.history(node.id)) >= 4)
    assert await phases(node) == [("recovery-begun", ""), ("recovery-downloaded", ""), ("recovery-ended", "")]


async def test_the_agent_that_comes_back_need_not_say_so(rescuing: World, node: Node) -> None:
    """The core ends the agent that would have told; what its updater reports counts."""
    async with node.connected() as channel:
        await recover(node, version="1.1.0")
        _, told = await order(channel)
        assert told["lines"] == ["agent", "updater"]
    async with node.connected("1.1.0"):
        for n, line in enumerate(("agent", "updater")):
            said = event("t", n + 1, "confirmed", line=line, digest=digest(rescuing, "1.1.0"))
            assert (await taking.transfer(rescuing, node.id))["state"] == "installing"
            await asyncio.to_thread(send, node, said)
        await taking.state(rescuing, node.id, "done")


@pytest.mark.slow
async def test_an_agent_that_comes_back_is_told_again_until_its_core_has_ended(node: Node) -> None:
    """Agent and core were killed, or only the agent: nobody on the node would tell."""
    async with node.connected() as channel:
        await recover(node, version="1.1.0", lines=["agent"])
        _, told = await order(channel)
    async with node.connected() as channel:
        for _ in range(2):
            for _ in range(4):  # nobody says a word for a while
                assert await alive(channel)
                await asyncio.sleep(3.5)
            _, again = await order(channel)
            assert again == told
            await channel.send("agentupdate-ended", id=told["id"], ok=False, code="recovery-running", text="")
        await channel.send("agentupdate-ended", id=told["id"], ok=True, code="", text="")
        await taking.state(node.world, node.id, "done")
    await eventually(lambda: node.world.history(node.id)[0]["phase"] == "recovery-ended")


async def test_what_cannot_be_recovered_is_refused(rescuing: World, node: Node) -> None:
    assert (await recover(node, 409))["error"]["code"] == "not-connected"
    assert (await recover(node, 404, version="7.7.7"))["error"]["code"] == "no-release"
    assert (await recover(node, 422, lines=["module/x"]))["error"]["code"] == "bad-request"
    other = Node(rescuing, node.folder / "other")
    other.id = "n-0000000000000000"
    assert (await recover(other, 404))["error"]["code"] == "unknown-node"
    async with node.connected() as channel:
        await recover(node)
        await taking.have(channel, await taking.offer(channel), digest="0" * 96)
        assert (await taking.state(rescuing, node.id, "declined"))["code"] == "never"
    await eventually(lambda: rescuing.history(node.id)[0]["reason_code"] == "never")
    assert await phases(node) == [("recovery-begun", ""), ("recovery-failed", "never")]


async def test_an_operator_goes_before_a_wish_and_the_last_word_counts(rescuing: World, node: Node) -> None:
    async with node.connected() as channel:
        await want(node)
        await taking.offer(channel)
        await recover(node, version="1.1.0")
        _, first = await order(channel)
        await recover(node, version="1.2.0")
        _, second = await order(channel)
        assert (first["version"], second["version"]) == ("1.1.0", "1.2.0")
        await channel.send("agentupdate-ended", id=first["id"], ok=True)  # of the one before: nothing
        assert (await taking.transfer(rescuing, node.id))["state"] == "installing"
        await channel.send(
            "agentupdate-ended", id=second["id"], ok=False, code="bad-hash", text="three times"
        )
        view = await taking.state(rescuing, node.id, "failed")
        assert (view["code"], view["text"]) == ("bad-hash", "three times")


@pytest.mark.slow
@pytest.mark.parametrize("role", ["agent", "beacon"])
async def test_an_order_that_finds_another_core_at_work_waits_for_its_end(
    rescuing: World, node: Node, role: str
) -> None:
    """What an operator has asked for is told again, and is not lost to the order before it."""
    async with node.connected("1.0.0", role=role) as channel:
        await recover(node, version="1.1.0", lines=["agent"])
        _, first = await order(channel)
        await recover(node, version="1.2.0", lines=["agent"])
        _, second = await order(channel)
        text = f"the recovery {first['id']} is under way"
        await channel.send("agentupdate-ended", id=second["id"], ok=False, code="busy", text=text)
        await eventually(lambda: rescuing.ask("GET", f"/nodes/{node.id}/transfer")["code"] == "busy")
        view = await taking.transfer(rescuing, node.id)
        assert (view["state"], view["text"], view["ended"]) == ("installing", text, None)
        for _ in range(4):
            assert await alive(channel)
            await asyncio.sleep(3.5)
        _, again = await order(channel)
        assert again == second
        await channel.send("agentupdate-ended", id=again["id"], ok=True, code="", text="")
        view = await taking.state(rescuing, node.id, "done")
        assert (view["code"], view["version"]) == ("", "1.2.0")
    await eventually(lambda: rescuing.history(node.id)[0]["phase"] == "recovery-ended")
    assert [what for what, _ in await phases(node) if what != "recovery-begun"] == ["recovery-ended"]


async def test_a_cut_on_the_way_is_taken_up(rescuing: World, node: Node) -> None:
    async with node.connected() as channel:
        await recover(node)
        first = await taking.take(channel, stop_after=1)
    async with node.connected() as channel:
        second = await taking.take(channel)
        assert second.offer["sha384"] == first.offer["sha384"]
        assert (await channel.read_type("agentupdate"))["core"] == first.offer["sha384"]
    assert await phases(node) == [("recovery-begun", "")]


async def test_an_operators_word_outlives_the_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Killed while the core runs: told again by the same id, ended, and then forgotten."""
    async with own_world(tmp_path_factory) as world:
        await asyncio.to_thread(world.publish, "1.0.0")
        await asyncio.to_thread(world.publish, "1.1.0")
        await asyncio.to_thread(world.publish_core, "1.0.0")
        node = await asyncio.to_thread(world.new_node)
        async with node.connected() as channel:
            await recover(node, version="1.0.0", lines=["updater"])  # another one takes its place
            await taking.offer(channel)
            await recover(node, version="1.1.0", lines=["agent"])
            first, told = await order(channel)
            await asyncio.to_thread(world.kill)
        await asyncio.to_thread(world.start)
        view = await taking.transfer(world, node.id)
        assert (view["version"], view["line"], view["cause"]) == ("1.1.0", "agent", "operator")
        async with node.connected() as channel:
            again = await order(channel)
            assert (again[0].offer["sha384"], again[1]) == (first.offer["sha384"], told)
            await channel.send("agentupdate-ended", id=told["id"], ok=True)
            await taking.state(world, node.id, "done")
        await eventually(lambda: world.history(node.id)[0]["phase"] == "recovery-ended")
        assert await phases(node) == [("recovery-begun", "")] * 2 + [("recovery-ended", "")]
        assert await asyncio.to_thread(world.stop) == 0
        await asyncio.to_thread(world.start)
        assert (await taking.transfer(world, node.id))["state"] == "none"
        async with node.connected() as channel:
            with pytest.raises(TimeoutError):
                await channel.read(3.0)


async def test_a_wish_by_way_of_recovery(rescuing: World, node: Node) -> None:
    async with node.connected() as channel:
        await want(node, "1.1.0", "agent", "updater", via="recovery")
        _, told = await order(channel)
        assert (told["version"], sorted(told["lines"])) == ("1.1.0", ["agent", "updater"])
        assert (await asyncio.to_thread(ask_wanted, node))["lines"]["agent"]["via"] == "recovery"
        await channel.send("agentupdate-ended", id=told["id"], ok=False, code="bad-hash")
        await taking.state(rescuing, node.id, "failed")
        _, again = await order(channel)  # after a rest
        assert again["id"] != told["id"]


# ---- beacons


async def test_a_beacon_is_helped_without_being_asked_for(rescuing: World, node: Node) -> None:
    async with node.connected("1.1.0") as old:
        assert await alive(old)
        async with node.connected("0.5.0", role="beacon") as beacon:
            assert (await old.read_type("refused"))["code"] == "replaced"
            taken, told = await order(beacon)
            assert taken.said["version"] == "1.10.0"
            # Nothing is wanted: what it last ran.
            assert (told["version"], told["lines"]) == ("1.1.0", ["agent", "updater"])
            seen = await asyncio.to_thread(rescuing.node, node.id)
            assert (seen["state"], seen["agent"]["version"]) == ("beacon", "1.1.0")
            listed = await asyncio.to_thread(rescuing.ask, "GET", "/nodes", params={"limit": 1000})
            assert {each["state"] for each in listed["nodes"] if each["id"] == node.id} == {"beacon"}
            assert await alive(beacon)
            await beacon.send("health", ok=True)
            assert (await beacon.read_type("error"))["code"] == "unexpected-message"
            await beacon.send("agentupdate-progress", id=told["id"], phase="fetch", percent=10)
            await beacon.send("agentupdatedownloaded", id=told["id"], sha384=told["sha384"])
            await beacon.send("agentupdate-ended", id=told["id"], ok=True)
            await taking.state(rescuing, node.id, "done")
    await eventually(lambda: rescuing.node(node.id)["state"] == "offline")
    await eventually(lambda: rescuing.history(node.id)[0]["phase"] == "recovery-ended")
    assert await phases(node) == [("recovery-begun", ""), ("recovery-downloaded", ""), ("recovery-ended", "")]
    async with node.connected("1.1.0"):
        assert (await asyncio.to_thread(rescuing.node, node.id))["state"] == "connected"


async def test_what_a_beacon_is_brought(rescuing: World, node: Node) -> None:
    """What is wanted; else what it last ran; else the newest."""
    async with node.connected("0.5.0", role="beacon") as beacon:
        _, told = await order(beacon)
        assert told["version"] == "1.2.0"
    other = await asyncio.to_thread(rescuing.new_node)
    async with other.connected("1.1.0"):
        pass
    await asyncio.to_thread(rescuing.want, "node", other.id, "1.0.0", "agent")
    async with other.connected("0.5.0", role="beacon") as beacon:
        _, told = await order(beacon)
        assert told["version"] == "1.0.0"


async def test_a_beacon_that_failed_is_helped_again_and_one_that_blinked_is_left_alone(node: Node) -> None:
    async with node.connected("0.5.0", role="beacon") as beacon:
        _, told = await order(beacon)
    async with node.connected("0.5.0", role="beacon") as beacon:  # the same process, by boot and pid
        with pytest.raises(TimeoutError):
            await beacon.read(3.0)
        await beacon.send("agentupdate-ended", id=told["id"], ok=False, code="fetch-failed", text="no route")
        _, again = await order(beacon)
        assert again["id"] != told["id"]


async def test_help_may_be_left_to_operators(tmp_path_factory: pytest.TempPathFactory) -> None:
    async with own_world(tmp_path_factory, beacon_recovery=False) as world:
        await asyncio.to_thread(world.publish, "1.0.0")
        node = await asyncio.to_thread(world.new_node)
        async with node.connected("0.5.0", role="beacon") as beacon:
            with pytest.raises(TimeoutError):
                await beacon.read(2.5)
            assert (await recover(node, 404))["error"]["code"] == "no-core"
            await asyncio.to_thread(world.publish_core, "1.0.0")
            await recover(node)
            _, told = await order(beacon)
            assert told["version"] == "1.0.0"


async def test_an_agent_takes_the_place_of_its_beacon(node: Node) -> None:
    async with node.connected("0.5.0", role="beacon") as beacon, node.connected("1.0.0"):
        while (frame := await beacon.read())["t"] != "refused":
            assert frame["t"] in ("update-offer", "closed"), frame
        assert frame["code"] == "replaced"
        assert (await asyncio.to_thread(node.world.node, node.id))["state"] == "connected"


# ---- artifacts on a port of their own


async def test_artifacts_have_their_own_port(tmp_path_factory: pytest.TempPathFactory) -> None:
    async with own_world(tmp_path_factory, artifacts_port=0) as world:
        await asyncio.to_thread(world.publish, "1.0.0")
        await asyncio.to_thread(world.publish_core, "1.0.0")
        node = await asyncio.to_thread(world.new_node)
        release = world.operator.releases["1.0.0"]
        path = f"/v1/targets/node/{release.sha256}.instar-1.0.0.tar.gz"
        place = (await asyncio.to_thread(ask_wanted, node))["artifacts"]
        assert place == f"https://127.0.0.1:{world.ports['artifacts_port']}"
        with (
            node.http() as here,
            httpx.Client(base_url=place, verify=node.context(), trust_env=False, timeout=60) as there,
        ):
            for each in (path, "/v1/metadata/timestamp.json"):
                refused = await asyncio.to_thread(here.get, each)
                assert (refused.status_code, refused.json()["error"]["code"]) == (421, "other-port")
                assert (await asyncio.to_thread(there.get, each)).status_code == 200
            assert (await asyncio.to_thread(there.get, path)).content == release.archive
            assert (await asyncio.to_thread(there.get, "/v1/node/wanted")).status_code == 404
            assert (await asyncio.to_thread(there.post, "/v1/enrol", json={})).status_code == 404
            # A core fetches where the channel is, and only what it is to install.
            async with node.connected() as channel:
                await recover(node)
                _, told = await order(channel)
                assert told["url"] == path
                assert (await asyncio.to_thread(here.get, path)).content == release.archive
                assert (await asyncio.to_thread(here.get, "/v1/metadata/timestamp.json")).status_code == 200
                core = world.operator.cores["1.0.0"]
                other = f"/v1/targets/recovery/{core.sha256}.core-1.0.0.pyz"
                assert (await asyncio.to_thread(here.get, other)).status_code == 421
                await channel.send("agentupdate-ended", id=told["id"], ok=True)
                await taking.state(world, node.id, "done")
            assert (await asyncio.to_thread(here.get, path)).status_code == 421
        nobody = ssl.create_default_context(cafile=str(world.layout.ca / "ca.pem"))
        stranger = httpx.Client(base_url=place, verify=nobody, trust_env=False, timeout=60)
        answer = await asyncio.to_thread(stranger.get, "/v1/metadata/timestamp.json")
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "no-certificate")
        await asyncio.to_thread(world.ask, "POST", f"/nodes/{node.id}/revoke", json={})
        with httpx.Client(base_url=place, verify=node.context(), trust_env=False, timeout=60) as there:
            assert (await asyncio.to_thread(there.get, path)).status_code == 403
