"""Metadata and targets as nodes fetch them, with ranges and resumption."""

from __future__ import annotations

import json

import pytest

from instar_server.domain import ranges
from tests.server.world import World


def test_ranges() -> None:
    assert ranges.parse("bytes=0-4", 10) == (0, 5)
    assert ranges.parse("bytes=5-", 10) == (5, 10)
    assert ranges.parse("bytes=5-99", 10) == (5, 10)
    assert ranges.parse("bytes=-3", 10) == (7, 10)
    assert ranges.parse("bytes=-99", 10) == (0, 10)
    assert ranges.parse("bytes=10-", 10) == "unsatisfiable"
    assert ranges.parse("bytes=-0", 10) == "unsatisfiable"
    for whole in ("bytes=", "bytes=-", "bytes=5-4", "bytes=1-2,4-5", "lines=1-2", "", "bytes=a-b"):
        assert ranges.parse(whole, 10) is None


def test_metadata_is_served_and_other_names_are_not(world: World) -> None:
    with world.new_node().http() as http:
        assert http.get("/v1/metadata/timestamp.json").json()["signed"]["_type"] == "timestamp"
        assert http.get("/v1/metadata/1.root.json").content == world.operator.root
        for name in ("99.root.json", "root.json", "..%2flock", "%00", "x" * 300):
            assert http.get(f"/v1/metadata/{name}").status_code == 404


def test_a_target_in_parts_is_the_whole(world: World) -> None:
    release = world.operator.releases["1.1.0"]
    folder, _, name = release.path.rpartition("/")
    url = f"/v1/targets/{folder}/{release.sha256}.{name}"
    size = len(release.archive)
    with world.new_node().http() as http:
        whole = http.get(url)
        assert whole.content == release.archive
        assert whole.headers["Accept-Ranges"] == "bytes"
        etag = whole.headers["ETag"]
        half = size // 2
        first = http.get(url, headers={"Range": f"bytes=0-{half - 1}"})
        rest = http.get(url, headers={"Range": f"bytes={half}-", "If-Range": etag})
        assert (first.status_code, rest.status_code) == (206, 206)
        assert rest.headers["Content-Range"] == f"bytes {half}-{size - 1}/{size}"
        assert first.content + rest.content == release.archive
        other = http.get(url, headers={"Range": f"bytes={half}-", "If-Range": '"another"'})
        assert (other.status_code, other.content) == (200, release.archive)
        beyond = http.get(url, headers={"Range": f"bytes={size}-"})
        assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{size}")
        head = http.head(url)
        assert (head.headers["Content-Length"], head.content) == (str(size), b"")


@pytest.mark.parametrize(
    "path", ["node/nothing", "..%2f..%2fserver.db", "node/../../server.db", "%2fetc%2fpasswd", "a%00b"]
)
def test_nothing_outside_is_served(world: World, path: str) -> None:
    with world.new_node().http() as http:
        assert http.get(f"/v1/targets/{path}").status_code == 404


def test_the_program_that_is_handed_out_carries_the_configuration(world: World) -> None:
    from instar.trust.embedded import read_embedded
    from instar.trust.program import program_digest

    token = world.token("handed")
    with world.api("none") as api:
        answer = api.get("/program", params={"token": token, "version": "1.0.0"})
        assert answer.status_code == 200
        config, _, _ = read_embedded(answer.content)
        assert (config.server, config.token, config.group) == (world.ports["gateway"], token, "handed")
        assert json.loads(world.operator.root) == config.root
        assert program_digest(answer.content) == world.operator.releases["1.0.0"].custom["program_digest"]
        assert api.get("/program", params={"token": "x"}).status_code == 403
        assert api.get("/program", params={"token": token, "group": "other"}).status_code == 400
        assert api.get("/program", params={"token": token, "version": "7.7.7"}).status_code == 404
        assert api.get("/program", params={"token": token}).headers["Instar-Version"] == "1.1.0"
