"""Native updates: parcels through control channels, taken by a played node over real TLS."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import httpx
import pytest

from instar.host.parcel import unpack_parcel
from instar_server.domain.transfers import ACK_S
from tests.server import taking
from tests.server.test_channel import alive, eventually
from tests.server.test_history import event, send
from tests.server.world import WITHIN_S, Channel, Node, World, running

NOISE = 200_000


@pytest.fixture(scope="module")
def sending(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server with small blocks, so that there are many."""
    folder = tmp_path_factory.mktemp("sending")
    with running(folder, ping_s=30.0, native_block=4096, native_window=8, wrong_tokens=1000) as world:
        world.publish("1.0.0")
        world.publish("1.1.0", NOISE)
        yield world


@pytest.fixture
async def node(sending: World) -> Node:
    return await asyncio.to_thread(sending.new_node, f"g{os.urandom(4).hex()}")


@contextlib.asynccontextmanager
async def own_world(factory: pytest.TempPathFactory, **settings: Any) -> AsyncIterator[World]:
    """A server for one test."""
    world = await asyncio.to_thread(World, factory.mktemp("own"), **settings)
    await asyncio.to_thread(world.start)
    try:
        yield world
    finally:
        await asyncio.to_thread(world.kill)


async def want(node: Node, version: str = "1.1.0", *lines: str, via: str = "native") -> None:
    await asyncio.to_thread(node.world.want, "node", node.id, version, *lines, via=via)


def digest(world: World, version: str = "1.1.0") -> str:
    return str(world.operator.releases[version].custom["program_digest"])


async def test_a_wish_is_sent_and_then_looked_for(sending: World, node: Node) -> None:
    async with node.connected() as channel:
        await want(node)
        offered = await taking.offer(channel)
        assert (offered["line"], offered["version"], offered["digest"]) == ("agent", "1.1.0", digest(sending))
        assert (offered["block"], offered["window"], offered["rate_bytes_s"]) == (4096, 8, 0)
        taken = await taking.take(channel, offered, every=4)
        assert taken.most <= 8
        assert (await channel.read_type("look"))["reason"] == "agent 1.1.0 is here"
        view = await taking.state(sending, node.id, "received")
        assert (view["blocks"], view["bytes"]) == (view["of_blocks"], offered["length"])
        assert (view["percent"], view["via"], view["cause"]) == (100.0, "native", "wish")
        assert view["ended"] >= view["began"]
    wanted = await asyncio.to_thread(ask_wanted, node)
    assert wanted["lines"]["agent"]["via"] == "native"
    # What came is what the contract says, and a node can unpack it.
    release = sending.operator.releases["1.1.0"]
    names = list(taken.members)
    assert (names[0], names[-1]) == ("parcel.json", "archive")
    assert names[1:-1] == [
        "metadata/1.root.json", "metadata/timestamp.json", "metadata/2.snapshot.json", "metadata/3.targets.json",
    ]  # fmt: skip
    assert taken.said == {
        "format": 1, "kind": "node", "version": "1.1.0", "digest": digest(sending), "target": release.path,
        "length": len(release.archive), "sha256": release.sha256,
    }  # fmt: skip
    assert taken.members["archive"] == release.archive
    assert taken.members["metadata/1.root.json"] == sending.operator.root
    found = unpack_parcel(io.BytesIO(taken.data), node.folder / "unpacked")
    assert (found.kind, found.version, found.digest) == ("node", "1.1.0", digest(sending))
    assert (node.folder / "unpacked" / "archive").read_bytes() == release.archive


def ask_wanted(node: Node, **query: Any) -> dict[str, Any]:
    with node.http() as http:
        answer = http.get("/v1/node/wanted", params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize(("block", "window", "every"), [(1024, 1, 1), (4096, 64, 4), (2000, 3, 2)])
async def test_the_smaller_figures_count(node: Node, block: int, window: int, every: int) -> None:
    async with node.connected() as channel:
        await want(node)
        taken = await taking.take(channel, every=every, block=block, window=window)
        assert taken.most <= min(8, window)


async def test_a_cut_transfer_goes_on_where_it_was(sending: World, node: Node) -> None:
    async with node.connected() as channel:
        await want(node)
        first = await taking.take(channel, stop_after=20)
        view = await taking.transfer(sending, node.id)
        assert view["state"] == "sending"
        channel.ws._response.connection.transport.abort()  # type: ignore[union-attr]
    await taking.state(sending, node.id, "cut")
    async with node.connected() as channel:
        offered = await taking.offer(channel)
        assert (offered["sha384"], offered["id"] == first.offer["id"]) == (first.offer["sha384"], False)
        there = first.data[: 19 * 4096]
        second = await taking.take(channel, offered, start=there)
        assert second.numbers[0] == 19
        await taking.state(sending, node.id, "received")


async def test_the_newer_channel_goes_on_with_it(sending: World, node: Node) -> None:
    async with node.connected() as older:
        await want(node)
        first = await taking.take(older, stop_after=12, every=4)
        async with node.connected() as newer:
            await taking.take(newer, start=first.data[: 8 * 4096])
    await taking.state(sending, node.id, "received")


async def test_a_restarted_server_goes_on_with_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    async with own_world(tmp_path_factory, native_block=4096) as world:
        await asyncio.to_thread(world.publish, "1.1.0", NOISE)
        node = await asyncio.to_thread(world.new_node)
        async with node.connected() as channel:
            await want(node)
            first = await taking.take(channel, stop_after=20)
            await asyncio.to_thread(world.kill)
        await asyncio.to_thread(world.start)
        async with node.connected() as channel:
            second = await taking.take(channel, start=first.data)
        assert second.data[: len(first.data)] == first.data


async def test_never_is_heeded_and_told_once(sending: World, node: Node) -> None:
    for _ in range(2):
        async with node.connected() as channel:
            await want(node) if _ == 0 else None
            await taking.have(channel, await taking.offer(channel), digest="0" * 96)
            view = await taking.state(sending, node.id, "declined")
            assert view["code"] == "never"
            assert await alive(channel)
    await eventually(lambda: any(each["phase"] == "declined" for each in sending.history(node.id)))
    entries = [each for each in await history(node) if each["phase"] == "declined"]
    assert [(each["reason_code"], each["line"], each["version"]) for each in entries] == [
        ("never", "agent", "1.1.0")
    ]


async def history(node: Node) -> list[dict[str, Any]]:
    return await asyncio.to_thread(node.world.history, node.id)


async def test_force_is_sent_and_the_same_is_not(sending: World, node: Node) -> None:
    async with node.connected() as channel:
        await want(node)
        await taking.take(channel, digest="f" * 96)
        await taking.state(sending, node.id, "received")
    other = await asyncio.to_thread(sending.new_node)
    async with other.connected() as channel:
        await want(other)
        await taking.have(channel, await taking.offer(channel), digest=digest(sending))
        await taking.state(sending, other.id, "not-needed")
        assert await alive(channel)


async def test_what_fails_on_the_node_is_tried_again_after_a_rest(sending: World, node: Node) -> None:
    async with node.connected() as channel:
        await want(node)
        offered = await taking.offer(channel)
        at = time.monotonic()
        await channel.send("update-state", id=offered["id"], state="failed", code="disk-full", text="no room")
        view = await taking.state(sending, node.id, "failed")
        assert (view["code"], view["text"]) == ("disk-full", "no room")
        await taking.take(channel)
        assert time.monotonic() - at >= 4.0


async def test_a_node_that_breaks_the_window_is_not_trusted_further(sending: World, node: Node) -> None:
    async with node.connected() as channel:
        await want(node)
        offered = await taking.offer(channel)
        await taking.have(channel, offered)
        await channel.send("update-ack", id=offered["id"], n=10_000)
        assert (await taking.state(sending, node.id, "failed"))["code"] == "bad-ack"
        await channel.send("update-ack", id="u-nobody", n=1)  # of nothing that is under way
        await channel.send("ping", n=5)
        while (frame := await channel.read())["t"] in ("update-block", "look"):
            pass
        assert frame == {"t": "pong", "n": 5}


async def test_updater_then_agent_and_nothing_during_a_transaction(sending: World, node: Node) -> None:
    async with node.connected() as channel:
        await want(node, "1.1.0", "agent", "updater")
        taken = await taking.take(channel)
        assert taken.offer["line"] == "updater"
        await asyncio.to_thread(send, node, event("t1", 1, "trial", line="updater", version="1.1.0"))
        await asyncio.to_thread(as_updater, node, digest(sending))
        await channel.read_type("look")
        with contextlib.suppress(TimeoutError):
            raise AssertionError(await channel.read(7.0))  # nothing, for it is at work
        await asyncio.to_thread(send, node, event("t1", 2, "confirmed", line="updater", version="1.1.0"))
        assert (await taking.offer(channel))["line"] == "agent"


def as_updater(node: Node, digest_: str) -> None:
    with node.http(f"updater 1.1.0 {digest_}") as http:
        assert http.get("/v1/node/wanted").status_code == 200


async def test_a_wish_that_is_taken_back_ends_it(sending: World, node: Node) -> None:
    async with node.connected() as channel:
        await want(node)
        await taking.take(channel, stop_after=5)
        query = {"scope": "node", "subject": node.id, "line": "agent"}
        await asyncio.to_thread(sending.ask, "DELETE", "/wishes", params=query)
        await taking.state(sending, node.id, "dropped")


async def test_a_new_wish_takes_the_place_of_the_old_one(sending: World, node: Node) -> None:
    async with node.connected("1.1.0", digest="cd" * 48) as channel:
        await want(node)
        await taking.take(channel, stop_after=5)
        await want(node, "1.0.0")
        at = time.monotonic()
        assert (await taking.offer(channel))["version"] == "1.0.0"
        assert time.monotonic() - at < ACK_S / 2  # it was called off, not waited for


async def test_trouble_with_the_artifacts_is_answered_through_the_channel(sending: World, node: Node) -> None:
    async with node.connected() as channel:
        await want(node, via="pull")
        await channel.read_type("look")
        for _ in range(3):
            wanted = await asyncio.to_thread(ask_wanted, node, trouble="artifacts-unreachable")
            assert "via" not in wanted["lines"]["agent"]
        offered = await channel.read_type("update-offer")
        await taking.take(channel, offered)
        view = await taking.state(sending, node.id, "received")
        assert view["cause"] == "trouble"
        await asyncio.to_thread(ask_wanted, node, trouble="something else")
    told: list[dict[str, Any]] = []
    async with asyncio.timeout(WITHIN_S):  # it is written in batches
        while not told:
            told = [each for each in await history(node) if each["phase"] == "artifacts-unreachable"]
    assert [(each["line"], each["version"]) for each in told] == [("agent", "1.1.0")]


async def test_a_channel_stays_quick_while_others_take_much(sending: World) -> None:
    """Eight nodes that read slowly, and one that pings meanwhile."""
    group = f"g{os.urandom(4).hex()}"
    nodes = [await asyncio.to_thread(sending.new_node, group) for _ in range(8)]
    other = await asyncio.to_thread(sending.new_node)

    async def slow(channel: Channel) -> None:
        await taking.have(channel, await taking.offer(channel))  # and never an ack

    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(each.connected()) for each in nodes]
        quiet = await stack.enter_async_context(other.connected())
        await asyncio.to_thread(sending.want, "group", group, "1.1.0", via="native")
        await asyncio.gather(*(slow(each) for each in channels))
        for _ in range(20):
            assert await alive(quiet)
        for each in nodes:
            view = await taking.transfer(sending, each.id)
            assert (view["state"], view["blocks"]) == ("sending", 0)


async def test_the_rest_waits_its_turn(tmp_path_factory: pytest.TempPathFactory) -> None:
    """64 transfers at a time; the 65th begins when one has ended. A recovery waits for none of them."""
    async with own_world(tmp_path_factory, ping_s=30.0, wrong_tokens=1000) as world:
        await asyncio.to_thread(world.publish, "1.1.0", 1000)
        await asyncio.to_thread(world.publish_core, "1.1.0")
        nodes = [await asyncio.to_thread(world.new_node) for _ in range(67)]
        async with contextlib.AsyncExitStack() as stack:
            channels = {each.id: await stack.enter_async_context(each.connected()) for each in nodes}
            await asyncio.to_thread(world.want, "group", "default", "1.1.0", via="native")

            offers = {id_: asyncio.create_task(taking.offer(channels[id_])) for id_ in channels}
            until = time.monotonic() + WITHIN_S
            while sum(each.done() for each in offers.values()) < 64:
                assert time.monotonic() < until
                await asyncio.sleep(0.05)
            await asyncio.sleep(8.0)  # longer than the scheduler's round
            late = [id_ for id_, each in offers.items() if not each.done()]
            assert len(late) == 3
            await stopped(offers.pop(id_) for id_ in late)
            found = {id_: each.result() for id_, each in offers.items()}
            assert {(await taking.transfer(world, id_))["state"] for id_ in late} == {"queued"}
            ordered = late.pop()
            await asyncio.to_thread(world.ask, "POST", f"/nodes/{ordered}/recover", json={})
            assert (await taking.offer(channels[ordered]))["line"] == "recovery"
            lost = await asyncio.to_thread(world.new_node)
            async with lost.connected("0.5.0", role="beacon") as beacon:
                assert (await taking.offer(beacon))["line"] == "recovery"
            assert {(await taking.transfer(world, id_))["state"] for id_ in late} == {"queued"}
            first = next(iter(found))
            await taking.take(channels[first], found[first])
            done, waiting = await asyncio.wait(
                [asyncio.create_task(taking.offer(channels[id_])) for id_ in late],
                return_when=asyncio.FIRST_COMPLETED,
            )
            assert len(done) == 1
            await stopped(waiting)


async def stopped(tasks: Iterable[asyncio.Task[Any]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_rate_is_kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    async with own_world(tmp_path_factory, native_block=8192, native_rate=65_536) as world:
        await asyncio.to_thread(world.publish, "1.1.0", 130_000)
        node = await asyncio.to_thread(world.new_node)
        async with node.connected() as channel:
            await want(node)
            at = time.monotonic()
            taken = await taking.take(channel)
            assert taken.offer["rate_bytes_s"] == 65_536
            assert time.monotonic() - at > (len(taken.data) - 2 * 8192) / 65_536


# ---- the API


def test_only_programs_can_be_sent(sending: World) -> None:
    sending.publish_module("watcher", "1.0.0", "service")
    body = {"scope": "group", "subject": "default", "lines": ["module/watcher"], "version": "1.0.0"}
    refused = sending.ask("PUT", "/wishes", 400, json=body | {"via": "native"})
    assert refused["error"]["code"] == "bad-via"
    assert sending.ask("PUT", "/wishes", 422, json=body | {"via": "pigeon"})
    view = sending.ask("GET", f"/nodes/{sending.new_node().id}/transfer")
    assert (view["state"], view["ended"]) == ("none", None)
    assert sending.ask("GET", "/nodes/n-0000000000000000/transfer", 404)


async def test_those_who_watch_see_it_go(sending: World, node: Node) -> None:
    seen: list[str] = []

    def watch() -> None:
        with sending.api() as api, contextlib.suppress(httpx.TransportError):
            path = f"/nodes/{node.id}/transfer/events"
            with api.stream("GET", path, params={"for_s": 60}) as stream:
                for line in stream.iter_lines():
                    seen.append(line)
                    if '"received"' in line:
                        return

    watching = asyncio.create_task(asyncio.to_thread(watch))
    await eventually(lambda: bool(seen))
    async with node.connected() as channel:
        await want(node)
        await taking.take(channel)
        await watching
    states = [
        part
        for line in seen
        for part in ("queued", "offered", "sending", "received")
        if f'"state": "{part}"' in line
    ]
    assert [state for n, state in enumerate(states) if state not in states[:n]] == [
        "queued", "offered", "sending", "received",
    ]  # fmt: skip
