"""The pure rules, by themselves."""

from __future__ import annotations

import doctest
import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar_server.domain import history, looks, wanted
from instar_server.domain.looks import LookAt, LookRules, Observed
from instar_server.domain.wanted import Wish

A, B = "a" * 96, "b" * 96
RULES = LookRules(floor_s=30, cap_s=600)


def wish(scope: str, subject: str, line: str, digest: str, generation: int) -> Wish:
    return Wish(scope, subject, line, "1.0.0", "node/x", digest, generation, 0.0, "me")


@pytest.mark.parametrize("name", ["history", "ranges", "tokens", "verdicts"])
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"instar_server.domain.{name}")).failed == 0


@pytest.mark.parametrize(
    ("node", "due"),
    [
        (Observed("n", "g", {"agent": B}), True),  # runs something else
        (Observed("n", "g", {}), True),  # not known what it runs
        (Observed("n", "g", {"agent": A}), False),  # has what is wanted
        (Observed("n", "other", {"agent": B}), False),  # not its group
        (Observed("n", "g", {"agent": B}, told=5, looked_at=1000 - 29, tries=1), False),  # told just now
        (Observed("n", "g", {"agent": B}, told=5, looked_at=1000 - 30, tries=1), True),
        (Observed("n", "g", {"agent": B}, told=5, looked_at=1000 - 31, tries=2), False),  # waits double
        (Observed("n", "g", {"agent": B}, told=5, looked_at=1000 - 60, tries=2), True),
        (Observed("n", "g", {"agent": B}, told=5, looked_at=1000 - 599, tries=99), False),
        (Observed("n", "g", {"agent": B}, told=5, looked_at=1000 - 600, tries=99), True),  # never gives up
        (Observed("n", "g", {"agent": B}, told=4, looked_at=999, tries=9), True),  # a new wish
        (
            Observed("n", "g", {"agent": B}, tx_phase="trial", told=5, looked_at=900, tries=1),
            False,
        ),  # at work
        (Observed("n", "g", {"agent": B}, tx_phase="trial", told=4, looked_at=900, tries=1), True),
        (Observed("n", "g", {"agent": A}, floor=9), False),
    ],
)
def test_who_needs_a_look(node: Observed, due: bool) -> None:
    found = looks.decide([wish("group", "g", "agent", A, 5)], [node], 1000.0, RULES)
    assert [look.node for look in found] == (["n"] if due else [])


def test_the_look_names_the_newest_unmet_wish() -> None:
    wishes = [wish("group", "g", "agent", A, 5), wish("node", "n", "updater", A, 7)]
    node = Observed("n", "g", {"agent": A, "updater": B})
    assert looks.decide(wishes, [node], 0.0, RULES) == [LookAt("n", 7, "updater 1.0.0 is wanted")]


def test_a_wish_of_the_node_goes_before_its_groups() -> None:
    wishes = [
        wish("node", "n", "agent", A, 1),
        wish("group", "g", "agent", B, 2),
        wish("group", "g", "updater", B, 3),
    ]
    for order in (wishes, wishes[::-1]):
        found = wanted.effective(order, "n", "g", floor=2)
        assert {line: (w.digest, w.generation) for line, w in found.items()} == {
            "agent": (A, 2),
            "updater": (B, 3),
        }


ENTRIES = st.lists(st.tuples(st.text(max_size=5), st.floats(0, 1e9)), min_size=1, max_size=6)


def chain(texts: list[tuple[str, float]]) -> list[dict[str, object]]:
    rows, previous = [], history.genesis("n")
    for n, (text, wall) in enumerate(texts, start=1):
        row: dict[str, object] = dict.fromkeys(history.FIELDS, "") | {
            "n": n,
            "reason_text": text,
            "wall": wall,
        }
        previous = row["hash"] = history.link(previous, row)
        rows.append(row)
    return rows


@given(ENTRIES, st.data())
def test_any_change_of_a_history_shows(texts: list[tuple[str, float]], data: st.DataObject) -> None:
    rows = chain(texts)
    head = str(rows[-1]["hash"])
    assert history.first_fault("n", rows, len(rows), head) is None
    assert history.first_fault("m", rows, len(rows), head) is not None
    place = data.draw(st.integers(0, len(rows) - 1))
    kind = data.draw(st.sampled_from(["change", "drop", "swap"]))
    altered = [dict(row) for row in rows]
    if kind == "change":
        altered[place]["reason_text"] = str(altered[place]["reason_text"]) + "x"
    elif kind == "drop":
        del altered[place]
    elif len(rows) > 1:
        altered[place - 1], altered[place] = altered[place], altered[place - 1]
    else:
        return
    assert history.first_fault("n", altered, len(rows), head) is not None
