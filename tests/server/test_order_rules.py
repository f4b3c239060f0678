"""What becomes of an order: the table, and what is due when. Pure."""

from __future__ import annotations

import doctest
import importlib
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.core import modules
from instar.core.errors import InputError
from instar_server.domain import names
from instar_server.domain.orders import (
    CONCLUDED,
    HELD,
    OPEN,
    TABLE,
    TAIL,
    WAITING,
    WORDS,
    Do,
    Event,
    Row,
    Rules,
    State,
    Step,
    after,
    decide,
    decide_joined,
    resend_gap,
    sources,
    tail,
    target,
    word_of,
)  # fmt: skip
from instar_server.domain.selectors import Selector, check, narrow

RULES = Rules(resend_s=10, resend_cap_s=300, silence_s=60)


def row(state: State, **more: object) -> Row:
    values = {"deadline_s": 30.0, "lapse_at": 10_000.0, "sends": 1, "sent_at": 1000.0, "heard_at": 1000.0}
    return Row("j-1", "o-1", "n-1", state, **{**values, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["orders", "selectors"])
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"instar_server.domain.{name}"))
    assert (found.failed, found.attempted > 0) == (0, True)


def test_the_table_is_whole() -> None:
    """Every open row ends by every last word; a word that was heard is never taken back; the clock and the
    operator move nothing that has ended."""
    for state, event in product(State, Event):
        to = after(state, event)
        if state in (State.DONE, State.FAILED):
            assert to is None
        if event in WORDS and (state in OPEN or state in CONCLUDED):
            assert to is not None
            assert to not in OPEN
        if event in (Event.CANCEL, Event.LAPSE):
            assert (to is not None) == (state in WAITING)
        if event is Event.LOSE:
            assert (to is not None) == (state in OPEN)
    assert {event for _, event in TABLE} == set(Event)
    assert all(after(state, event) is target(event) for event in Event for state in sources(event))
    order = [State.QUEUED, State.SENT, State.TAKEN, State.RUNNING]
    for event in (Event.SEND, Event.TAKEN, Event.BEGUN):
        for state in sources(event):  # never back
            assert order.index(target(event)) >= order.index(state)


@pytest.mark.parametrize(
    ("ok", "code", "state"),
    [
        (True, "", State.DONE), (False, "failed", State.FAILED), (False, "cancelled", State.CANCELLED),
        (False, "lapsed", State.LAPSED), (False, "deadline", State.FAILED), (True, "lapsed", State.DONE),
    ],
)  # fmt: skip
def test_what_a_result_makes_of_a_row(ok: bool, code: str, state: State) -> None:
    assert target(word_of(ok, code)) is state


GAP = resend_gap("j-1", 1, RULES)


@pytest.mark.parametrize(
    ("given_", "connected", "now", "do", "event", "due_at"),
    [
        # Not taken.
        (row(State.QUEUED, sends=0, sent_at=None), False, 1000.0, Do.WAIT, None, 10_000.0),
        (row(State.QUEUED, sends=0, sent_at=None), True, 1000.0, Do.SEND, None, 1000 + GAP),
        (row(State.SENT), True, 1000 + GAP - 0.1, Do.WAIT, None, 1000 + GAP),
        (row(State.SENT), True, 1000 + GAP, Do.SEND, None, 1000 + GAP + resend_gap("j-1", 2, RULES)),
        (row(State.SENT), False, 1000 + GAP, Do.WAIT, None, 10_000.0),
        (row(State.SENT), True, 10_000.0, Do.END, Event.LAPSE, None),
        (row(State.SENT), False, 10_000.0, Do.END, Event.LAPSE, None),
        (row(State.QUEUED, sends=0, sent_at=None), False, 10_000.0, Do.END, Event.LAPSE, None),
        # Taken: its node has 30 s, and 60 more; then it is asked. All ends at the lapse, and a run after it.
        (row(State.TAKEN), True, 1089.0, Do.WAIT, None, 1090.0),
        (row(State.TAKEN), True, 1090.0, Do.SEND, None, 1180.0),
        (row(State.RUNNING), True, 1090.0, Do.SEND, None, 1180.0),
        (row(State.TAKEN), False, 1090.0, Do.WAIT, None, 10_030.0),
        (row(State.TAKEN), True, 10_050.0, Do.SEND, None, 10_090.0),
        (row(State.TAKEN), False, 10_030.0, Do.END, Event.LOSE, None),
        (row(State.TAKEN), True, 10_090.0, Do.END, Event.LOSE, None),
        # Ended, or its node was revoked.
        (row(State.DONE), True, 99_999.0, Do.WAIT, None, None),
        (row(State.CANCELLED), True, 99_999.0, Do.WAIT, None, None),
        (row(State.QUEUED, revoked=True), False, 1000.0, Do.END, Event.LOSE, None),
        (row(State.RUNNING, revoked=True), True, 1000.0, Do.END, Event.LOSE, None),
    ],
)
def test_what_is_due(
    given_: Row, connected: bool, now: float, do: Do, event: Event | None, due_at: float | None
) -> None:
    step = decide(given_, connected, now, RULES)
    assert (step.do, step.event) == (do, event)
    assert step.due_at == (pytest.approx(due_at) if due_at is not None else None)
    assert bool(step.code and step.text) == (do is Do.END)


@pytest.mark.parametrize(
    ("given_", "now", "step"),
    [
        (row(State.QUEUED, sends=0), 5.0, Step(Do.SEND, 5 + resend_gap("j-1", 1, RULES))),
        (row(State.SENT, sends=1), 5.0, Step(Do.SEND, 5 + resend_gap("j-1", 2, RULES))),
        (row(State.TAKEN), 5000.0, Step(Do.WAIT, 5090.0)),  # it sends its results by itself
        (row(State.RUNNING, cancelled=True), 5000.0, Step(Do.SEND, 5090.0)),
        (row(State.CANCELLED, cancelled=True), 5000.0, Step(Do.SEND, None)),
        (row(State.TAKEN), 10_089.0, Step(Do.WAIT, 10_149.0)),  # time to send what it has, late as it is
    ],
)
def test_what_is_due_when_a_node_comes(given_: Row, now: float, step: Step) -> None:
    assert decide_joined(given_, now, RULES) == step
    if given_.state in WAITING:
        assert decide_joined(given_, given_.lapse_at, RULES).event is Event.LAPSE
        gone = Row(**{name: getattr(given_, name) for name in Row.__slots__} | {"revoked": True})
        assert decide_joined(gone, now, RULES).event is Event.LOSE


@given(
    state=st.sampled_from(OPEN),
    lapse_s=st.floats(1, 1e6),
    deadline_s=st.floats(0.1, 1e5),
    there=st.lists(st.booleans(), min_size=1, max_size=8),
)
def test_every_row_ends_and_is_not_decided_about_too_often(
    state: State, lapse_s: float, deadline_s: float, there: list[bool]
) -> None:
    """Whatever a node that says nothing does, coming and going: time goes on with every step, and the end comes."""
    now, sends, sent_at, steps = 0.0, 0, None, 0
    while True:
        at = Row("j-7", "o", "n", state, deadline_s, lapse_s, sent_at, sends, 0.0)
        step = decide(at, there[steps % len(there)], now, RULES)
        if step.do is Do.END:
            break
        assert step.due_at is not None
        assert step.due_at > now
        if step.do is Do.SEND:
            sends, sent_at = sends + 1, now
        now, steps = step.due_at, steps + 1
        assert steps < 20_000
    late_s = deadline_s + RULES.silence_s if state in HELD else 0.0
    assert now <= (lapse_s + late_s) * (1 + 1e-9)
    assert sends <= 2 + 6 + (lapse_s + late_s) / (RULES.resend_cap_s if state in WAITING else RULES.silence_s)


def test_gaps_grow_and_are_spread() -> None:
    gaps = [resend_gap("j-1", sends, RULES) for sends in range(1, 12)]
    assert gaps == sorted(gaps)
    assert all(10 <= gap <= 375 for gap in gaps)
    assert len({resend_gap(f"j-{n}", 1, RULES) for n in range(100)}) > 50


def test_a_tail_is_bounded_and_whole_characters() -> None:
    assert tail("ab", "cd") == "abcd"
    text = ""
    for _ in range(500):
        text = tail(text, "é€𝄞x")
    assert TAIL - 4 < len(text.encode()) <= TAIL
    assert text.endswith("é€𝄞x")
    assert set(text) == set("é€𝄞x")
    assert tail("", "\ud800") == "\ud800"


@pytest.mark.parametrize(
    ("selector", "good"),
    [
        (Selector(), False), (Selector(("n",)), True), (Selector(group="g"), True), (Selector(all=True), True),
        (Selector(where={"os": "linux"}), True), (Selector(("n",), "g"), False),
        (Selector(group="g", all=True), False), (Selector(group="g", where={"a": 1}), True),
        (Selector(where={str(n): n for n in range(17)}), False), (Selector(("n",) * 10_001), False),
    ],
)  # fmt: skip
def test_a_selector_says_who(selector: Selector, good: bool) -> None:
    if good:
        assert check(selector) is selector
        return
    with pytest.raises(InputError) as caught:
        check(selector)
    assert caught.value.code == "bad-selector"


@pytest.mark.parametrize(
    ("where", "meant"),
    [
        ({}, True), ({"os": "linux"}, True), ({"os": "Linux 6"}, False), ({"rack": 4}, True),
        ({"rack": "4"}, True), ({"rack": "5"}, False), ({"ssd": "true"}, True), ({"ssd": True}, True),
        ({"ssd": False}, False), ({"python": "3.11"}, True), ({"none": ""}, False), ({"os": "linux", "rack": 5}, False),
    ],
)  # fmt: skip
def test_who_is_meant(where: dict[str, str | int | bool], meant: bool) -> None:
    facts = {"os": "Linux 6", "rack": 4, "ssd": True, "python": "3.11", "none": None}
    assert narrow(facts, {"os": "linux", "python": ""}, where) is meant


@given(st.from_regex(modules.NAME, fullmatch=True) | st.text(max_size=70))
def test_lines_of_modules_are_those_of_the_nodes(name: str) -> None:
    if modules.NAME.fullmatch(name) and len(name) <= modules.MOST_NAME:
        assert names.line(modules.line_of(name)) == modules.line_of(name)
        assert names.module_of(names.line(f"module/{name}")) == name
    else:
        with pytest.raises(InputError):
            names.line(f"module/{name}")
