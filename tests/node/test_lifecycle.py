"""The tables of a module's life and of a command's: every entry, and what must hold of them as a whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.core import commands, lifecycle
from instar.core.commands import FINAL, MOST_MODULES, RESUMED, TYPES, Status, check, verdict
from instar.core.depends import dependents, depths, faults
from instar.core.errors import InputError
from instar.core.lifecycle import BOUND, COMING, SERVES, SHOWN, STOPPING, TABLE, UP, Event, State, after

S, E = State, Event
EXPECTED = {
    S.ABSENT: {E.START: S.STARTING, E.BLOCKED: S.FAILED, E.STOP: S.STOPPED},
    S.STARTING: {E.READY: S.READY, E.ENDED: S.FAILED, E.LATE: S.FAILED, E.STOP: S.STOP_ASKED},
    S.READY: {E.UNWELL: S.UNWELL, E.ENDED: S.FAILED, E.STOP: S.STOP_ASKED},
    S.UNWELL: {E.WELL: S.READY, E.ENDED: S.FAILED, E.STOP: S.STOP_ASKED},
    S.FAILED: {E.START: S.RETRYING, E.STOP: S.STOPPED},
    S.RETRYING: {E.READY: S.PROVING, E.ENDED: S.FAILED, E.LATE: S.FAILED, E.STOP: S.STOP_ASKED},
    S.PROVING: {E.STEADY: S.READY, E.UNWELL: S.UNWELL, E.ENDED: S.FAILED, E.STOP: S.STOP_ASKED},
    S.STOP_ASKED: {E.SAVED: S.READY_TO_STOP, E.ENDED: S.STOPPED, E.LATE: S.KILLED},
    S.READY_TO_STOP: {E.ENDED: S.STOPPED, E.LATE: S.KILLED},
    S.STOPPED: {E.START: S.STARTING, E.BLOCKED: S.FAILED, E.RETIRED: S.ABSENT},
    S.KILLED: {E.START: S.STARTING, E.BLOCKED: S.FAILED, E.RETIRED: S.ABSENT},
}


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", list(Event))
def test_each_entry_and_no_other(state: State, event: Event) -> None:
    assert after(state, event) is EXPECTED[state].get(event, state)
    assert ((state, event) in TABLE) == (event in EXPECTED[state])


def test_wherever_it_is_it_can_be_stopped_and_started_again() -> None:
    for state in State:
        stopped = after(state, E.STOP)
        ended = stopped if stopped not in STOPPING else after(after(stopped, E.SAVED), E.ENDED)
        assert ended in (S.STOPPED, S.KILLED), state
        assert after(ended, E.START) is S.STARTING


def test_a_bound_that_passes_never_leaves_it_where_it_was() -> None:
    for state in (S.STARTING, S.RETRYING, S.STOP_ASKED, S.READY_TO_STOP):
        assert after(state, E.LATE) is not state
        assert state in BOUND


def test_what_is_shown() -> None:
    assert set(SHOWN) == set(State)
    assert [state for state in State if SHOWN[state] == "ok"] == [S.READY]
    assert SERVES > UP
    assert not COMING & SERVES
    assert all(SHOWN[state] == "starting" for state in COMING)


@given(st.lists(st.sampled_from(Event)))
def test_only_proof_leads_from_failed_to_ok(events: list[Event]) -> None:
    state, proven = S.FAILED, False
    for event in events:
        proven = proven or event in (E.STEADY, E.WELL, E.STOP)  # STOP: an order, after which it starts anew
        state = after(state, event)
        assert proven or SHOWN[state] != "ok"


# --- dependencies


names = st.sampled_from("abcdef")
graphs = st.dictionaries(names, st.lists(names, max_size=3).map(tuple), max_size=6)


@given(graphs)
def test_what_has_no_fault_can_be_started_one_after_the_other(graph: dict[str, tuple[str, ...]]) -> None:
    wrong, started = faults(graph), set[str]()
    for _ in graph:
        started |= {n for n, needs in graph.items() if n not in wrong and set(needs) <= started}
    level = depths(graph)
    for name in set(graph) - set(wrong):
        if name in started:
            assert level[name] == max((1 + level[need] for need in graph[name]), default=0)
        else:  # it waits for one that has a fault
            assert set(graph[name]) - started
    for name in wrong:
        assert name not in started


@given(graphs, st.lists(names))
def test_dependents_hold_all_that_need_one_of_them(
    graph: dict[str, tuple[str, ...]], chosen: list[str]
) -> None:
    found = dependents(graph, chosen)
    assert set(chosen) <= found
    assert all(name in found for name, needs in graph.items() if found & set(needs))


def test_many_that_depend_on_many_are_no_trouble() -> None:
    graph = {f"m{n}": tuple(f"m{low}" for low in range(n)) for n in range(200)}
    assert faults(graph) == {}
    assert depths(graph)["m199"] == 199


# --- commands


def test_the_statuses() -> None:
    table = {(s.value, e.value): t.value for (s, e), t in commands.TABLE.items()}
    assert table == {
        ("pending", "begun"): "in-progress",
        ("pending", "failed"): "failure",
        ("in-progress", "begun"): "in-progress",
        ("in-progress", "done"): "success",
        ("in-progress", "failed"): "failure",
        ("in-progress", "late"): "timeout",
    }
    assert set(RESUMED) == set(TYPES)


@pytest.mark.parametrize("status", sorted(FINAL, key=lambda s: s.value))
@pytest.mark.parametrize("event", list(commands.Event))
def test_nothing_follows_a_final_status(status: Status, event: commands.Event) -> None:
    with pytest.raises(ValueError, match="cannot have"):
        commands.after(status, event)


@pytest.mark.parametrize(
    ("kind", "modules", "within_s"),
    [
        ("restart", [], 30.0),
        ("", [], 30.0),
        ("restart-module", ["x"] * (MOST_MODULES + 1), 30.0),
        ("restart-module", [], 0.5),
        ("restart-agent", [], 601.0),
        ("restart-agent", [], float("nan")),
        ("restart-agent", [], float("inf")),
    ],
)
def test_commands_that_nobody_could_obey(kind: str, modules: list[str], within_s: float) -> None:
    with pytest.raises(InputError) as caught:
        check(kind, modules, within_s)
    assert caught.value.code == "bad-command"
    check("restart-agent", [], 30.0)
    check("restart-module", ["x"] * MOST_MODULES, 1.0)


def test_verdicts() -> None:
    assert verdict({}, 1.0, 30.0).event is commands.Event.DONE
    assert verdict({"a": "running"}, 30.0, 30.0).event is commands.Event.DONE
    failed = verdict({"a": "running", "b": "failed: no disk"}, 1.0, 30.0)
    assert (failed.event, failed.code) == (commands.Event.FAILED, "module-failed")
    assert failed.text == "cannot restart: b: failed: no disk"
    late = verdict({"a": "running"}, 31.0, 30.0)
    assert (late.event, late.code) == (commands.Event.LATE, "timeout")
    assert late.text == "cannot restart within 30 s: it took 31.0 s; everything runs again"
    assert "b not running" in verdict({"b": "failed: x"}, 31.0, 30.0).text
    assert lifecycle.PROVE_S < lifecycle.STEADY_S
