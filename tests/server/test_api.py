"""The operators' API: its document is true, its roles hold."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.server.test_channel import eventually
from tests.server.world import World, running

# Of the right form, and still a 400: no such release, a file of another digest, metadata without signatures,
# an order for nobody, a bundle that has no name, a time that is no time.
SAY_NO = {
    ("POST", "/api/v1/jobs"),
    ("POST", "/api/v1/nodes/{node}/update-os"),
    ("POST", "/api/v1/nodes/{node}/cold-boot"),
    ("POST", "/api/v1/operators"),
    ("POST", "/api/v1/restarts"),
    ("PUT", "/api/v1/wishes"),
    ("PUT", "/api/v1/blobs/{sha256}"),
    ("PUT", "/api/v1/trust/targets"),
    ("PUT", "/api/v1/trust/root"),
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server that may be filled with rubbish."""
    with running(
        tmp_path_factory.mktemp("api"), insecure_http=True, max_upload=100_000, wrong_tokens=100_000
    ) as world:
        world.ports["api_port_http"] = world.ports["api"]
        release = world.operator.add("1.0.0")
        headers = {"Authorization": f"Bearer {world.admin}"}
        with httpx.Client(
            base_url=f"{world.ports['api']}/api/v1", headers=headers, trust_env=False, timeout=60
        ) as api:
            api.put(f"/blobs/{release.sha256}", content=release.archive).raise_for_status()
            api.put("/trust/targets", content=world.operator.targets).raise_for_status()
        yield world


def test_the_document_is_true(own: World) -> None:
    """Generated requests to every operation, good and bad, get only answers that the document describes."""
    schema = schemathesis.openapi.from_url(f"{own.ports['api']}/api/v1/openapi.json")
    schema = schema.exclude(path="/api/v1/stream")  # it does not end; it has a test of its own
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 20
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            _check(operation, mode, own.admin)


def _check(operation: Any, mode: GenerationMode, token: str) -> None:
    @given(operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        # Of these nothing is left in a URL: the request that goes out is a good one.
        assume(not any(value in ([], {}, None) for value in (case.query or {}).values()))
        excluded = [positive_data_acceptance] if (case.method, case.path) in SAY_NO else []
        case.call_and_validate(headers={"Authorization": f"Bearer {token}"}, excluded_checks=excluded)

    try:
        check()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE  # nothing about this operation can be wrong


def client(own: World, token: str | None) -> httpx.Client:
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    return httpx.Client(base_url=f"{own.ports['api']}/api/v1", headers=headers, trust_env=False, timeout=60)


def test_roles_hold(own: World) -> None:
    tokens = {}
    with client(own, own.admin) as api:
        for role in ("viewer", "operator"):
            tokens[role] = api.post("/api-tokens", json={"role": role}).json()["token"]
    calls = [
        ("viewer", "GET", "/nodes", None, 200),
        ("viewer", "POST", "/tokens", {}, 403),
        ("viewer", "PUT", "/trust/targets", {}, 403),
        ("operator", "POST", "/tokens", {}, 201),
        ("operator", "POST", "/api-tokens", {"role": "admin"}, 403),
        ("operator", "GET", "/api-tokens", None, 403),
    ]
    for role, method, path, body, status in calls:
        with client(own, tokens[role]) as api:
            answer = api.request(method, path, json=body)
            assert answer.status_code == status, (role, method, path, answer.text)
            if status == 403:
                assert answer.json()["error"]["code"] == "role-too-low"
    for token in (None, "nonsense", "x" * 5000):
        with client(own, token) as api:
            answer = api.get("/nodes")
            assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")


def test_the_last_admin_cannot_be_deleted(own: World) -> None:
    with client(own, own.admin) as api:
        admins = [t["id"] for t in api.get("/api-tokens").json()["tokens"] if t["role"] == "admin"]
        first = admins[0]
        for other in admins[1:]:
            api.delete(f"/api-tokens/{other}").raise_for_status()
        answer = api.delete(f"/api-tokens/{first}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "last-admin")


def test_blobs_are_what_they_say_and_bounded(own: World) -> None:
    data = os.urandom(1000)
    sha256 = hashlib.sha256(data).hexdigest()
    blobs = own.layout.trust / "blobs"
    with client(own, own.admin) as api:
        assert api.put(f"/blobs/{sha256}", content=data).json() == {"sha256": sha256, "length": 1000}
        assert api.put(f"/blobs/{sha256}", content=data).status_code == 200
        wrong = api.put(f"/blobs/{sha256}", content=data + b"x")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "blob-mismatch")
        large = api.put(f"/blobs/{sha256}", content=b"x" * 100_001)
        assert (large.status_code, large.json()["error"]["code"]) == (413, "body-too-large")
    assert (blobs / sha256).read_bytes() == data
    assert not list(blobs.glob(".upload-*"))


def test_only_properly_signed_metadata_is_published(own: World) -> None:
    with client(own, own.admin) as api:
        for data in (
            b"",
            b"{}",
            own.operator.targets.replace(b"1.0.0", b"6.6.6"),
            own.operator.targets[:-20],
        ):
            answer = api.put("/trust/targets", content=data)
            assert answer.status_code == 400, answer.text
        assert api.get("/releases").json()["releases"][0]["version"] == "1.0.0"
        assert api.get("/trust/metadata/root.json").content == own.operator.root
        assert api.get("/trust/metadata/targets.json").content == own.operator.targets
        roles = {role["role"]: role for role in api.get("/trust").json()["roles"]}
        assert (roles["root"]["threshold"], roles["root"]["keys"]) == (2, 3)
        assert roles["timestamp"]["expired"] is False


async def test_the_stream_tells_what_changes(world: World) -> None:
    seen: list[str] = []

    def read() -> None:
        with world.api() as api, api.stream("GET", "/stream", params={"for_s": 60}) as stream:
            for line in stream.iter_lines():
                seen.append(line)
                if '"kind": "disconnected"' in line and node.id in line:
                    return

    node = await asyncio.to_thread(world.new_node)
    reader = asyncio.create_task(asyncio.to_thread(read))
    await eventually(lambda: ": connected" in seen)
    other = await asyncio.to_thread(world.new_node)
    async with node.connected():
        pass
    await reader
    for kind, who in (("enrolled", other), ("connected", node), ("disconnected", node)):
        assert any(line == f"event: {kind}" and who.id in body for line, body in pairwise(seen)), kind


def test_pages(world: World, tmp_path: Path) -> None:
    group = f"g{os.urandom(3).hex()}"
    ids = sorted(world.new_node(group).id for _ in range(5))
    found: list[str] = []
    after = ""
    with world.api() as api:
        while True:
            query = {"group": group, "limit": 2} | ({"after": after} if after else {})
            page = api.get("/nodes", params=query).json()
            found += [node["id"] for node in page["nodes"]]
            after = page["next"]
            if after is None:
                break
    assert found == ids
