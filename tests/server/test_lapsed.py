"""A node whose certificate has run out while it was off: what it is served, and how it comes back."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from instar_server.ca import FleetCA
from instar_server.gateway.channels import SWEEP_S
from tests.server import taking
from tests.server.test_enrolment import code
from tests.server.world import Node, World, make_csr, running

EXPIRED = (403, "certificate-expired")


@pytest.fixture(scope="module")
def helping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("helping"), ping_s=30.0, wrong_tokens=1000) as world:
        world.publish("1.0.0")
        world.publish_core("1.0.0")
        yield world


@pytest.fixture
def node(helping: World) -> Node:
    node = helping.new_node()
    node.lapse()
    return node


def test_it_gets_the_next_certificate_and_nothing_else(node: Node) -> None:
    with node.http() as http:
        for path in ("/v1/node/wanted", "/v1/node/verdict", "/v1/metadata/timestamp.json", "/v1/targets/x"):
            assert code(http.get(path)) == EXPIRED
        assert code(http.post("/v1/node/events", json={"v": 1, "events": []})) == EXPIRED
        assert "/v1/renew" in http.get("/v1/node/wanted").json()["error"]["message"]
        answer = http.post("/v1/renew", json={"v": 1, "csr": make_csr(node.key)})
        assert answer.status_code == 200
        assert code(http.get("/v1/node/wanted")) == EXPIRED  # that one stays what it is
    (node.folder / "cert.pem").write_text(answer.json()["certificate"])
    with node.http() as http:
        assert http.get("/v1/node/wanted").json()["node"] == node.id


@pytest.mark.parametrize("whole", [True, False])
def test_revoked_it_gets_nothing(helping: World, node: Node, whole: bool) -> None:
    csr = {"v": 1, "csr": make_csr(node.key)}
    with node.http() as http:
        assert code(http.get("/v1/node/wanted")) == EXPIRED  # known from now on
        with helping.api() as api:
            path = f"/nodes/{node.id}/revoke" if whole else f"/certificates/{node.serial}/revoke"
            assert api.post(path, json={}).status_code == 200
        assert code(http.post("/v1/renew", json=csr)) == (403, "revoked")
        assert code(http.get("/v1/node/wanted")) == (403, "revoked")


def test_the_rest_of_the_certificate_is_checked_all_the_same(helping: World, node: Node) -> None:
    """Of another CA: no handshake. Of ours, but never issued, or another node's name: no renewal."""
    begin, csr = time.time() - 40 * 86400, {"v": 1, "csr": make_csr(node.key)}
    stranger = FleetCA.create(helping.folder / f"ca-{os.urandom(4).hex()}", begin)
    issued = stranger.issue_node(node.id, node.key.public_key(), begin, 86400)
    (node.folder / "cert.pem").write_text(issued.pem)
    with node.http() as http, pytest.raises(httpx.TransportError):
        http.post("/v1/renew", json=csr)
    issued = FleetCA.load(helping.layout.ca).issue_node(node.id, node.key.public_key(), begin, 86400)
    (node.folder / "cert.pem").write_text(issued.pem)
    with node.http() as http:
        assert code(http.post("/v1/renew", json=csr)) == (403, "certificate-unknown")


def test_an_operators_certificate_that_ran_out_opens_nothing_here(helping: World, node: Node) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    begin = time.time() - 40 * 86400
    issued = FleetCA.load(helping.layout.ca).issue_operator("ann", node.key.public_key(), begin, 86400)
    (node.folder / "cert.pem").write_text(issued.pem)
    with node.http() as http:
        assert code(http.post("/v1/renew", json={"v": 1, "csr": make_csr(key)})) == (403, "not-a-node")


@pytest.mark.parametrize("role", ["agent", "rehearsal"])
async def test_its_agent_is_told_why_it_has_no_channel(node: Node, role: str) -> None:
    async with node.channel() as channel:
        await channel.hello(role=role, tx="t-1" if role == "rehearsal" else "")
        refused = await channel.read()
        assert (refused["t"], refused["code"]) == ("refused", "certificate-expired")
        assert refused["retry_after_s"] < 10  # it renews, and is back
        assert (await channel.read())["t"] == "closed"


async def test_its_beacon_is_helped_and_the_core_gets_what_it_needs(helping: World, node: Node) -> None:
    async with node.connected("0.5.0", role="beacon") as beacon:
        taken = await taking.take(beacon)
        assert taken.offer["line"] == "recovery"
        told = await beacon.read_type("agentupdate")
        await asyncio.sleep(
            SWEEP_S + 0.5
        )  # past a sweep: this channel does not end for its certificate's age

        def ask() -> list[int]:
            with node.http() as http:
                events = http.post("/v1/node/events", json={"v": 1, "events": []})
                found = [http.get("/v1/metadata/timestamp.json"), http.get(told["url"]), events]
                found.append(http.get("/v1/node/wanted"))
                verdict = {"line": "agent", "phase": "trial", "tx": "t-1", "digest": told["digest"]}
                found.append(http.get("/v1/node/verdict", params=verdict))
                return [answer.status_code for answer in found]

        assert await asyncio.to_thread(ask) == [200] * 5
        async with node.connected("1.0.0", role="rehearsal", tx="t-1"):
            pass
        async with node.channel() as agent:  # the role agent renews, recovery or not
            await agent.hello()
            assert (await agent.read())["code"] == "certificate-expired"
        await beacon.send("agentupdate-ended", id=told["id"], ok=True)
        await taking.state(helping, node.id, "done")
        assert await asyncio.to_thread(ask) == [403] * 5


async def test_a_beacon_is_cut_off_when_it_is_revoked(helping: World, node: Node) -> None:
    async with node.connected("0.5.0", role="beacon") as beacon:
        await asyncio.to_thread(helping.ask, "POST", f"/nodes/{node.id}/revoke", json={})
        while (frame := await beacon.read())["t"] != "refused":
            assert frame["t"] in ("update-offer", "update-end"), frame
        assert frame["code"] == "revoked"
