"""Groups are made on purpose: by `groups add`, or by a token, whose answer says so."""

from __future__ import annotations

import os

import pytest

from tests.server.world import World


@pytest.fixture
def name() -> str:
    """Of a group that is not there."""
    return f"g{os.urandom(3).hex()}"


def groups(world: World) -> set[str]:
    return {group["name"] for group in world.ask("GET", "/groups")["groups"]}


def test_a_node_is_not_moved_into_a_group_that_is_not_there(world: World, name: str) -> None:
    node = world.new_node()
    before = (world.node(node.id), world.history(node.id), groups(world))
    answer = world.ask("PUT", f"/nodes/{node.id}/group", 404, json={"group": name})
    assert answer["error"]["code"] == "unknown-group"
    assert f"instarctl groups add {name}" in answer["error"]["message"]
    assert (world.node(node.id), world.history(node.id), groups(world)) == before


def test_a_node_moves_into_a_group_that_was_made(world: World, name: str) -> None:
    node = world.new_node()
    world.ask("POST", "/groups", json={"name": name})
    assert world.ask("PUT", f"/nodes/{node.id}/group", json={"group": name})["group"] == name
    assert world.history(node.id)[0]["reason_text"] == f"moved from default to {name}"


def test_a_wish_for_a_group_that_is_not_there_says_how_to_make_it(world: World, name: str) -> None:
    body = {"scope": "group", "subject": name, "lines": ["agent"], "version": "1.0.0"}
    error = world.ask("PUT", "/wishes", 404, json=body)["error"]
    assert error["code"] == "unknown-group"
    assert f"instarctl groups add {name}" in error["message"]


def test_an_unknown_node_is_told_before_an_unknown_group(world: World, name: str) -> None:
    answer = world.ask("PUT", f"/nodes/n-{'0' * 16}/group", 404, json={"group": name})
    assert answer["error"]["code"] == "unknown-node"


def test_a_token_that_makes_its_group_says_so_once(world: World, name: str) -> None:
    made = [world.ask("POST", "/tokens", 201, json={"group": name})["group_made"] for _ in range(2)]
    assert made == [True, False]
    assert name in groups(world)
