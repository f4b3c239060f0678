"""What the API says to wrong words: which form was expected and what was got, in words and never as a pattern."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from instar_server.web import wording
from tests.server.world import World

WRONG: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    ("GET", "/nodes/nope", {}, ("path.node", "a node's id, such as n-0123456789abcdef", "got 'nope'")),
    ("GET", "/jobs/123", {}, ("path.order", "an order's id, such as o-0123456789abcdef01234567", "got '123'")),
    ("DELETE", "/tokens/nope", {}, ("path.token", "hexadecimal digits", "got 'nope'")),
    ("POST", "/groups", {"json": {"name": "bad name/.."}}, ("body.name", "1 to 63", "lower-case letters", "got 'bad name/..'")),
    ("POST", "/tokens", {"json": {"group": "Webb"}}, ("body.group", "lower-case letters", "got 'Webb'")),
    ("POST", "/tokens", {"json": {"label": "a\nb"}}, ("body.label", "without control characters", r"got 'a\nb'")),
    (
        "PUT",
        "/wishes",
        {"json": {"scope": "group", "subject": "default", "lines": ["kernel"], "version": "1.0.0"}},
        ("body.lines.0", "agent, updater or module/NAME", "got 'kernel'"),
    ),
    ("POST", "/jobs", {"json": {"module": "No", "select": {"all": True}}}, ("body.module", "interfaces.list", "got 'No'")),
    ("GET", "/nodes?group=A", {}, ("query.group", "lower-case letters", "got 'A'")),
    ("PUT", "/blobs/xyz", {"content": b""}, ("path.sha256", "64 hexadecimal digits", "got 'xyz'")),
]  # fmt: skip


def refused(world: World, method: str, path: str, status: int, **more: Any) -> tuple[str, str]:
    """The code and the text of a refusal."""
    error = world.ask(method, path, status, **more)["error"]
    return error["code"], error["message"]


@pytest.mark.parametrize(("method", "path", "more", "words"), WRONG)
def test_a_wrong_form_is_told_in_words(
    world: World, method: str, path: str, more: dict[str, Any], words: tuple[str, ...]
) -> None:
    code, text = refused(world, method, path, 422, **more)
    assert code == "bad-request"
    assert text.startswith("cannot use the request: "), text
    assert all(word in text for word in words), text
    assert not set("^$?*").intersection(text), text


def test_what_was_got_is_bounded_and_printable(world: World) -> None:
    nasty = "\x1b[31m" + "é" * 9000
    for body in ({"name": nasty}, {"name": "web", nasty: 1}):
        text = refused(world, "POST", "/groups", 422, json=body)[1]
        assert text.isascii()
        assert text.isprintable()
        assert len(text) < 300


def patterns(document: Any) -> Iterator[str]:
    """Every pattern anywhere in a JSON document."""
    if isinstance(document, dict):
        if isinstance(pattern := document.get("pattern"), str):
            yield pattern
        for value in document.values():
            yield from patterns(value)
    elif isinstance(document, list):
        for value in document:
            yield from patterns(value)


def test_every_pattern_of_the_document_has_its_words(world: World) -> None:
    found = set(patterns(world.ask("GET", "/openapi.json")))
    assert len(found) >= 10
    assert {pattern for pattern in found if wording.expected(pattern) == wording.ANY_OTHER} == set()


def test_an_unknown_path_is_named_and_the_document_too(world: World) -> None:
    code, text = refused(world, "GET", "/nodez", 404)
    assert code == "not-found"
    assert "'/api/v1/nodez'" in text
    assert "/api/v1/openapi.json" in text
    assert len(refused(world, "GET", "/" + "z" * 5000, 404)[1]) < 300


def test_an_unknown_method_is_named(world: World) -> None:
    code, text = refused(world, "PATCH", "/nodes", 405)
    assert code == "method-not-allowed"
    assert "PATCH '/api/v1/nodes'" in text
