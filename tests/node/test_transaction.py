"""The table: every entry, and that the diagram in the documents says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from instar.core.transaction import DEADLINE_S, FINAL, MOST_TRIES, STEP, TABLE, Event, State, Step, after

DOCUMENT = Path(__file__).parents[2] / "docs" / "transaction.md"
D, F = Event.DONE, Event.FAILED

EXPECTED = [
    (State.OFFERED, D, State.STAGED),
    (State.OFFERED, F, State.REVERTING),
    (State.STAGED, D, State.VERIFIED),
    (State.STAGED, F, State.REVERTING),
    (State.VERIFIED, D, State.REHEARSED),
    (State.VERIFIED, F, State.REVERTING),
    (State.REHEARSED, D, State.TRIAL),
    (State.REHEARSED, F, State.REVERTING),
    (State.TRIAL, D, State.CONFIRMING),
    (State.TRIAL, F, State.REVERTING),
    (State.CONFIRMING, D, State.CONFIRMED),
    (State.CONFIRMING, F, State.CONFIRMING),
    (State.REVERTING, D, State.REVERTED),
    (State.REVERTING, F, State.REVERTING),
]


@pytest.mark.parametrize(("state", "event", "then"), EXPECTED)
def test_each_entry(state: State, event: Event, then: State) -> None:
    assert after(state, event) is then


def test_there_are_no_other_entries() -> None:
    assert {(s, e): t for s, e, t in EXPECTED} == TABLE


@pytest.mark.parametrize("state", sorted(FINAL, key=lambda s: s.value))
@pytest.mark.parametrize("event", list(Event))
def test_nothing_follows_a_final_state(state: State, event: Event) -> None:
    with pytest.raises(ValueError, match="final"):
        after(state, event)


def test_every_state_that_is_not_final_owes_a_step_of_its_own() -> None:
    assert set(STEP) == set(State) - FINAL
    assert sorted(s.value for s in STEP.values()) == sorted(s.value for s in Step)


def test_a_failure_never_leads_forwards_and_every_state_can_end() -> None:
    for state in STEP:
        assert after(state, F) in (State.REVERTING, state)
    for state in State:
        seen = state
        for _ in State:
            seen = seen if seen in FINAL else after(seen, D)
        assert seen in FINAL


def test_steps_without_a_bound_on_tries_have_another_one() -> None:
    assert set(Step) - set(MOST_TRIES) == {Step.WATCH, Step.CONFIRM, Step.REVERT}
    assert Step.WATCH not in DEADLINE_S  # its lease
    assert all(seconds > 0 for seconds in DEADLINE_S.values())


def test_the_diagram_shows_the_table() -> None:
    drawn = {
        (a, b, note)
        for a, b, note in re.findall(r"^ {2}(\w+) --> (\w+): (.+)$", DOCUMENT.read_text(), re.MULTILINE)
    }
    table = {
        (state.value, then.value, STEP[state].value + (" failed" if event is F else ""))
        for (state, event), then in TABLE.items()
        if state is not then  # a step that is only done again is no arrow
    }
    assert drawn == table
