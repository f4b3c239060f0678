"""core.recovery.decide: each state with each thing that may be found on the disk."""

from __future__ import annotations

from dataclasses import replace

import pytest

from instar.core.journal import Progress, Reason
from instar.core.recovery import Decision, Fail, Finished, Observation, Run, decide
from instar.core.transaction import FINAL, MOST_TRIES, STEP, State, Step
from tests.node.test_journal_records import AT, BEGIN

OLD, NEW, OTHER = BEGIN.origin, BEGIN.release.name, "0.9.0-999999999999"
UNDONE = Reason("attempts-used-up", "3 times")
SEEN = {
    "old": Observation(OLD),
    "new": Observation(NEW, OLD),
    "other": Observation(OTHER),
    "none": Observation(""),
    "old-undone": Observation(OLD, undone=UNDONE),
    "new-undone": Observation(NEW, undone=UNDONE),
}


def progress(state: State) -> Progress:
    return Progress(BEGIN, AT, state)


def expected(state: State, seen: str) -> Decision:
    if state in FINAL:
        return Finished()
    if seen.endswith("undone") and state in (State.REHEARSED, State.TRIAL):
        return Fail(UNDONE)
    if state is State.TRIAL and seen != "new":
        return Fail(Reason("undone", f"{SEEN[seen].current or 'nothing'} is active in its place"))
    return Run(STEP[state])


@pytest.mark.parametrize("seen", list(SEEN))
@pytest.mark.parametrize("state", list(State))
def test_each_state_with_each_observation(state: State, seen: str) -> None:
    assert decide(progress(state), SEEN[seen]) == expected(state, seen)


@pytest.mark.parametrize("state", list(STEP))
def test_a_step_is_begun_a_bounded_number_of_times(state: State) -> None:
    step = STEP[state]
    seen = SEEN["new"] if state is State.TRIAL else SEEN["old"]
    for tries in range(10):
        decision = decide(replace(progress(state), tries={step: tries}), seen)
        if step in MOST_TRIES and tries >= MOST_TRIES[step]:
            assert isinstance(decision, Fail)
            assert decision.reason.code == "interrupted-too-often"
            assert step.value in decision.reason.text
        else:
            assert decision == Run(step)


def test_tries_of_another_step_do_not_count() -> None:
    assert decide(replace(progress(State.STAGED), tries={Step.STAGE: 99}), SEEN["old"]) == Run(Step.VERIFY)
