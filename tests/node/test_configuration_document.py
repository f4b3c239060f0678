"""docs/configuration.md says what the code has: the server's settings, bounds, and units."""

from __future__ import annotations

import dataclasses
import re

import pytest

from instar.cli.unit_files import UNITS
from instar.core.settings import BOUNDS
from instar_lab import docs
from instar_server import settings as server

TEXT = (docs.ROOT / "docs" / "configuration.md").read_text()
NODE, SERVER = TEXT.split("## On the server: ")
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight")


def row(text: str, name: str) -> list[str]:
    """Default, bounds and meaning of a setting, as the table has them."""
    found = re.search(rf"^\| `{re.escape(name)}` \|(.*)\|$", text, re.MULTILINE)
    assert found, name
    return [cell.strip() for cell in found[1].split("|")]


def number(cell: str) -> float:
    return float(cell.replace(",", "").replace("10¹²", "1e12"))


@pytest.mark.parametrize("field", dataclasses.fields(server.Settings), ids=lambda field: field.name)
def test_server_settings(field: dataclasses.Field[object]) -> None:
    default, bounds, meaning = row(SERVER, field.name)
    value = getattr(server.Settings(), field.name)
    if isinstance(value, bool):
        assert default == str(value).lower()
    elif isinstance(value, int | float):
        assert number(default) == value
        assert tuple(map(number, bounds.split(" to "))) == server._BOUNDS[field.name]
    elif isinstance(value, str):
        assert default == (f"`{value}`" if value else "–")
    assert meaning


@pytest.mark.parametrize("name", [name for name in BOUNDS if f"| `{name}` |" in NODE])  # some share a row
def test_node_settings(name: str) -> None:
    assert tuple(map(number, row(NODE, name)[1].split(" to "))) == BOUNDS[name]


def test_the_waits_of_the_updater_have_their_own_bounds() -> None:
    for name in ("updater.retry_floor_s", "updater.retry_cap_s"):
        row(NODE, name)


def test_as_many_units_as_there_are() -> None:
    assert f"{NUMBERS[len(UNITS)]} units below" in NODE


def test_what_a_change_of_os_needs() -> None:
    assert "`instar stop`, then `instar start`" in NODE
    assert "`--api`" in NODE.partition("| key |")[0]
