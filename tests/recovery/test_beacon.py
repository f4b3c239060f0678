"""The launcher's beacon, in the real launcher, against a played server: a node of which nothing is left (M5)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from instar.host import processes
from instar.host.locks import RoleLock
from instar.wire.messages import (
    NEVER,
    AgentUpdateDownloaded,
    AgentUpdateEnded,
    AgentUpdateProgress,
    Error,
    Job,
    Look,
    Ping,
    Pong,
    Refused,
    UpdateHave,
    Welcome,
)
from instar_lab.program import variants
from instar_server.trust.pack import Release
from tests.agent.fleet import NODE
from tests.node.tls_server import Proxy
from tests.recovery.conftest import Builds
from tests.recovery.gateway import Gateway, Recorded, deliver, follow, offer_of, order_of, parcel
from tests.recovery.place import SETTINGS, Place


def broken(place: Place, harm: str) -> None:
    for role in ("agent", "updater"):
        place.zero(role) if harm == "zeros" else place.delete(role)


async def helped(
    connection: Recorded, gateway: Gateway, release: Release, core: Release, lines: list[str]
) -> list[object]:
    """Deliver the core, order the recovery; what the node told of it."""
    data = parcel(gateway.world, core, "recovery")
    _, state = await deliver(connection, offer_of(core, data), data)
    assert state is not None
    assert state.state == "received", state
    await connection.send(order_of(release, data, lines))
    return list(await follow(connection))


@pytest.mark.parametrize("harm", ["zeros", "deleted"])
async def test_a_node_without_any_release_comes_back(
    place: Place, gateway: Gateway, builds: Builds, release: Release, harm: str
) -> None:
    core = gateway.publish_core(builds.core)
    broken(place, harm)
    place.keep()
    connection = await gateway.call("beacon")
    hello = connection.hello
    assert (hello.node, hello.version, hello.digest) == (NODE, builds.old.version, builds.old.digest)
    assert (hello.tx, hello.pid) == ("", place.pid("agent"))
    told = await helped(connection, gateway, release, core, ["agent", "updater"])
    assert any(isinstance(word, AgentUpdateDownloaded) for word in told), told
    assert any(isinstance(word, AgentUpdateProgress) and word.percent == 100 for word in told)
    agent = await gateway.call("agent")
    assert (agent.hello.version, agent.hello.digest) == (builds.new.version, builds.new.digest)
    assert agent.hello.tx != ""
    await place.until(lambda: place.is_on(builds.new))
    await place.until(lambda: not place.layout.starts.exists())  # the agent's welcome removes the count


async def test_it_answers_pings_and_refuses_other_work(place: Place, gateway: Gateway) -> None:
    gateway.welcome = Welcome(1, "test", ping_s=0.3, health_s=30.0)
    broken(place, "deleted")
    place.launch()
    connection = await gateway.call("beacon")
    await connection.send(Ping(7))
    assert (await connection.until(Pong)) == Pong(7)
    assert isinstance(await connection.until(Ping), Ping)
    await connection.send(Job("j-1", "selftest"))
    error = await connection.until(Error)
    assert isinstance(error, Error)
    assert error.code == "unexpected-type"
    await connection.send_raw("{nonsense")
    assert (await connection.until(Error)).code == "not-json"  # type: ignore[union-attr]
    for line in ("agent", "updater"):
        await connection.send(replace(_offer(), line=line))
        have = await connection.until(UpdateHave)
        assert isinstance(have, UpdateHave)
        assert have.digest == NEVER


def _offer() -> object:
    from instar.wire.messages import UpdateOffer

    return UpdateOffer("u-9", "recovery", "9.0.0", "ab" * 48, "recovery/core-9.0.0.pyz", 10, "cd" * 48)


async def test_a_core_that_is_not_signed_is_not_run(
    place: Place, gateway: Gateway, builds: Builds, release: Release
) -> None:
    core = gateway.publish_core(builds.core)
    broken(place, "deleted")
    place.launch()
    connection = await gateway.call("beacon")
    altered = core.archive[:-1] + bytes([core.archive[-1] ^ 1])
    data = parcel(gateway.world, core, "recovery", altered)
    _, state = await deliver(connection, offer_of(core, data), data)
    assert state is not None
    assert state.state == "received", "it is whole; who signed it is asked when it is to run"
    await connection.send(order_of(release, data, ["agent"]))
    last = (await follow(connection))[-1]
    assert isinstance(last, AgentUpdateEnded)
    assert (last.ok, last.code) == (False, "altered-core")
    unsigned = parcel(gateway.world, replace(core, path="recovery/core-9.9.9.pyz"), "recovery")
    offer = replace(offer_of(core, unsigned), id="u-2", target="recovery/core-9.9.9.pyz")
    _, state = await deliver(connection, offer, unsigned)
    assert state is not None
    assert state.state == "received", state
    await connection.send(replace(order_of(release, unsigned, ["agent"]), id="r-2"))
    last = (await follow(connection))[-1]
    assert isinstance(last, AgentUpdateEnded)
    assert (last.ok, last.code) == (False, "no-such-target")
    await connection.send(replace(order_of(release, unsigned, ["agent"]), id="r-3", core="ef" * 48))
    last = (await follow(connection))[-1]
    assert isinstance(last, AgentUpdateEnded)
    assert (last.ok, last.code) == (False, "no-core")
    await connection.send(replace(order_of(release, unsigned, ["agent"]), lines=["moon"]))
    assert (await connection.until(Error)).code == "bad-order"  # type: ignore[union-attr]
    assert not (place.state / "rescue").exists()


async def test_a_recovery_that_fails_is_told_and_can_be_tried_again(
    place: Place, gateway: Gateway, builds: Builds, release: Release
) -> None:
    core = gateway.publish_core(builds.core)
    broken(place, "zeros")
    place.keep()
    connection = await gateway.call("beacon")
    data = parcel(gateway.world, core, "recovery")
    await deliver(connection, offer_of(core, data), data)
    order = order_of(release, data, ["agent", "updater"])
    await connection.send(replace(order, sha384="ab" * 48))
    last = (await follow(connection))[-1]
    assert isinstance(last, AgentUpdateEnded)
    assert (last.ok, last.code) == (False, "bad-hash")
    await connection.send(replace(order, id="r-2"))
    await follow(connection)
    await place.until(lambda: place.is_on(builds.new))


async def test_a_cut_transfer_goes_on_where_it_stopped(
    place: Place, gateway: Gateway, builds: Builds, release: Release
) -> None:
    core = gateway.publish_core(builds.core)
    broken(place, "deleted")
    place.launch()
    connection = await gateway.call("beacon")
    data = parcel(gateway.world, core, "recovery")
    offer = offer_of(core, data, block=32_768, window=8)
    await deliver(connection, offer, data, most=20)
    await asyncio.sleep(0.5)
    began = time.monotonic()
    await connection.cut()
    second = await gateway.call("beacon")
    assert time.monotonic() - began > 0.9, "the floor of its waits"
    have, state = await deliver(second, replace(offer, id="u-2"), data)
    assert 0 < have.have <= 20
    assert state is not None
    assert state.state == "received"
    altered = data[:-1] + b"\1"
    _, state = await deliver(second, replace(offer_of(core, data), id="u-3", sha384="ab" * 48), altered)
    assert state is not None
    assert (state.state, state.code) == ("failed", "altered-parcel")


async def test_the_servers_word_on_staying_away_stands(place: Place, gateway: Gateway) -> None:
    gateway.refuse = Refused("not-now", "come back later", 2.5)
    broken(place, "deleted")
    place.launch()
    await place.until(lambda: len(gateway.times) >= 2)
    assert gateway.times[1] - gateway.times[0] >= 2.4
    gateway.refuse = None
    await gateway.call("beacon")


async def test_it_calls_again_for_ever(place: Place, gateway: Gateway) -> None:
    """The server is away when the node needs it, and comes back."""
    await gateway.stop()
    broken(place, "deleted")
    child = place.launch()
    await asyncio.sleep(2.5)
    assert child.poll() is None
    await gateway.start()
    await gateway.call("beacon")


async def test_through_a_proxy(place: Place, gateway: Gateway) -> None:
    proxy = Proxy()
    try:
        network = f'[network]\nproxy = "http://user:pass@127.0.0.1:{proxy.port}"\n'
        place.layout.config.write_text(network + SETTINGS)
        broken(place, "deleted")
        place.launch()
        connection = await gateway.call("beacon")
        await connection.send(Ping(1))
        await connection.until(Pong)
    finally:
        proxy.close()
    line, headers = proxy.requests[0]
    assert line == f"CONNECT 127.0.0.1:{gateway.port} HTTP/1.1"
    assert headers["proxy-authorization"] == "Basic dXNlcjpwYXNz"


async def test_a_release_that_appears_is_started(place: Place, gateway: Gateway, builds: Builds) -> None:
    """Somebody put one there by hand; the server does not answer."""
    await gateway.stop()
    broken(place, "deleted")
    place.launch()
    await asyncio.sleep(1.0)
    place.put("agent", builds.old)
    await place.until(lambda: place.is_on(builds.old, ("agent",)))
    await gateway.start()
    assert (await gateway.call("agent")).hello.digest == builds.old.digest


async def test_it_has_the_agents_role(place: Place, gateway: Gateway) -> None:
    broken(place, "deleted")
    child = place.launch()
    await gateway.call("beacon")
    assert place.pid("agent") == child.pid
    assert not RoleLock(place.layout.role_lock("agent")).try_acquire()
    second = place.launch()
    assert await asyncio.to_thread(second.wait, 60) == 4
    child.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(child.wait, 60) == -signal.SIGTERM


async def test_a_release_that_never_gets_a_welcome_calls_for_help(
    place: Place, gateway: Gateway, builds: Builds, release: Release
) -> None:
    """Valid, signed, and of no use: five starts, then the beacon has its time before the sixth."""
    core = gateway.publish_core(builds.core)
    for role in ("agent", "updater"):
        place.put(role, variants.variant("does-not-start", "1.0.2"))
    place.keep()
    connection = await gateway.call("beacon", within_s=180.0)
    starts = place.layout.starts.read_text().splitlines()
    assert len(starts[1].split()) == 5
    assert place.pid("agent") == connection.hello.pid
    await helped(connection, gateway, release, core, ["agent", "updater"])
    await place.until(lambda: place.is_on(builds.new))


async def test_a_lost_connection_leaves_the_core_at_work(
    place: Place, gateway: Gateway, builds: Builds, release: Release
) -> None:
    core = gateway.publish_core(builds.core)
    broken(place, "zeros")
    place.keep()
    connection = await gateway.call("beacon")
    data = parcel(gateway.world, core, "recovery")
    await deliver(connection, offer_of(core, data), data)
    gateway.slow_s = 0.2
    await connection.send(order_of(release, data, ["agent", "updater"]))
    while not isinstance(await connection.until(AgentUpdateProgress), AgentUpdateProgress):
        pass
    await place.until(lambda: any(path.startswith("/v1/targets") for path in gateway.asked))
    await connection.cut()
    await place.until(lambda: place.is_on(builds.new))


async def test_killed_anywhere_the_node_comes_back(
    place: Place, gateway: Gateway, builds: Builds, release: Release
) -> None:
    """Beacon and core are killed again and again. Whoever calls next, beacon or agent, gets the order."""
    core = gateway.publish_core(builds.core)
    broken(place, "zeros")
    data = parcel(gateway.world, core, "recovery")
    place.keep()
    for number in range(5):
        connection = await gateway.call("beacon", "agent")
        order = replace(order_of(release, data, ["agent", "updater"]), id=f"r-{number}")
        with contextlib.suppress(AssertionError):  # a core that lives on may end it meanwhile
            await deliver(connection, replace(offer_of(core, data), id=f"u-{number}"), data)
            await connection.send(order)
            await connection.until(AgentUpdateProgress, AgentUpdateEnded)
        await asyncio.sleep(0.3 + 0.4 * number)
        running = processes.recorded(place.layout.process("recovery"))
        if running is not None:
            processes.send(running, place.clock.boot_id(), signal.SIGKILL)
        if number % 2 and place.pid("agent") == connection.hello.pid:
            os.kill(connection.hello.pid, signal.SIGKILL)
        await connection.cut()
    for _ in range(4):
        with contextlib.suppress(AssertionError, TimeoutError):
            connection = await gateway.call("beacon", "agent", within_s=60.0)
            await helped(connection, gateway, release, core, ["agent", "updater"])
        if place.is_on(builds.new):
            break
    await place.until(lambda: place.is_on(builds.new))


async def test_an_updater_line_of_which_nothing_is_left_is_served_by_the_agents_release(
    place: Place, gateway: Gateway, builds: Builds, release: Release
) -> None:
    """And brought back by it, as soon as the server wants something there."""
    place.zero("updater")
    place.keep()
    await place.until(lambda: place.runs("updater") == builds.old.digest)
    custom = release.custom
    wish = {"version": custom["version"], "digest": release.digest, "target": release.path, "generation": 1}
    gateway.wanted = {"updater": wish}
    connection = await gateway.call("agent")
    await connection.send(Look("wanted"))
    await place.until(lambda: place.is_on(builds.new, ("updater",)))
    assert place.is_on(builds.old, ("agent",))


def test_the_core_is_known_by_its_parcel(builds: Builds, tmp_path: Path) -> None:
    assert builds.core.digest == hashlib.sha384(builds.core.data[:-2]).hexdigest()
