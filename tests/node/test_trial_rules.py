"""core.trial: the lease, the comparison with before, and the judgement."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.core.journal import Reason
from instar.core.trial import Confirm, Facts, Health, Judgement, Lease, Revert, Wait, judge

WANTED, OTHER = "ab" * 48, "cd" * 48
LEASE = Lease(120.0, 3600.0, "boot-1", 1000.0)
WELL = Health(True, {"base": "ok"})
FACTS = Facts(spent_s=5.0, answers=True, digest=WANTED, up_s=11.0, health=WELL, verdict="pass")
HOLD = 10.0
BAD = Reason("wrong-reply", "the reply was wrong")


def judged(facts: Facts, before: Health = WELL) -> Judgement:
    return judge(facts, WANTED, before, HOLD, LEASE)


def test_both_sides_say_yes() -> None:
    assert judged(FACTS) == Confirm()


@pytest.mark.parametrize(
    ("facts", "missing"),
    [
        (replace(FACTS, answers=False), "does not answer"),
        (replace(FACTS, digest=OTHER), "it reports cdcdcdcdcdcd, not abababababab"),
        (replace(FACTS, up_s=9.9), "9.9 of 10 s"),
        (replace(FACTS, health=Health(False, {"base": "ok"})), "connected before"),
        (replace(FACTS, health=Health(True, {"base": "failed"})), "module base was ok before, and is failed"),
        (replace(FACTS, health=Health(True, {})), "module base was ok before, and is gone"),
        (replace(FACTS, verdict="wait"), "verdict is 'wait'"),
        (replace(FACTS, verdict="unreachable"), "verdict is 'unreachable'"),
    ],
)
def test_anything_that_is_missing_is_waited_for_within_the_lease(facts: Facts, missing: str) -> None:
    judgement = judged(facts)
    assert isinstance(judgement, Wait)
    assert missing in judgement.missing
    assert not judgement.stretched
    late = judged(replace(facts, spent_s=120.0))
    if facts.verdict == "unreachable":
        assert isinstance(late, Wait)
        assert late.stretched
    else:
        assert isinstance(late, Revert)
        assert late.blame
        assert late.reason.code == "lease-lapsed"
        assert missing in late.reason.text


def test_a_server_that_has_just_come_back_gets_time_to_judge() -> None:
    """Else a release is put back because the updater reached the server before the agent did."""
    late = replace(FACTS, verdict="wait", spent_s=500.0)
    back = judged(replace(late, back_s=119.0))
    assert isinstance(back, Wait)
    assert back.stretched
    assert isinstance(judged(replace(late, back_s=121.0)), Revert)
    assert isinstance(judged(replace(late, back_s=1.0, spent_s=3600.0)), Revert)
    assert isinstance(judged(replace(late, back_s=1.0, answers=False)), Revert)


def test_the_servers_no_reverts_at_once_whatever_else_is_well() -> None:
    assert judged(replace(FACTS, verdict="fail", verdict_reason=BAD)) == Revert(BAD)
    assert judged(replace(FACTS, verdict="fail", verdict_reason=BAD, answers=False)) == Revert(BAD)


def test_a_network_fault_stretches_the_lease_up_to_its_cap_and_blames_nobody() -> None:
    alone = replace(FACTS, verdict="unreachable", health=Health(False, {"base": "ok"}))
    for spent, want in ((119.9, Wait), (120.0, Wait), (3599.9, Wait), (3600.0, Revert)):
        assert isinstance(judged(replace(alone, spent_s=spent)), want)
    end = judged(replace(alone, spent_s=3600.0))
    assert isinstance(end, Revert)
    assert not end.blame
    assert end.reason.code == "unconfirmed"


@pytest.mark.parametrize("facts", [replace(FACTS, answers=False), replace(FACTS, digest=OTHER)])
def test_a_release_that_is_not_up_is_no_network_fault(facts: Facts) -> None:
    end = judged(replace(facts, verdict="unreachable", spent_s=120.0))
    assert isinstance(end, Revert)
    assert end.blame


@given(
    st.builds(
        Facts,
        spent_s=st.floats(0, 1e5),
        answers=st.booleans(),
        digest=st.sampled_from([WANTED, OTHER, ""]),
        up_s=st.floats(0, 100),
        health=st.builds(
            Health, st.booleans(), st.dictionaries(st.sampled_from("ab"), st.sampled_from(["ok", "failed"]))
        ),
        verdict=st.sampled_from(["pass", "fail", "wait", "unreachable"]),
    )
)
def test_a_release_is_confirmed_only_if_all_is_well_and_a_trial_always_ends(facts: Facts) -> None:
    judgement = judged(facts)
    well = facts.answers and facts.digest == WANTED and facts.up_s >= HOLD and facts.verdict == "pass"
    assert isinstance(judgement, Confirm) == (well and not facts.health.worse_than(WELL))
    assert not isinstance(judged(replace(facts, spent_s=3600.0)), Wait)


# --- only what got worse


@pytest.mark.parametrize(
    ("before", "now", "worse"),
    [
        (Health(False, {}), Health(False, {}), ""),
        (Health(False, {}), Health(True, {}), ""),
        (Health(True, {}), Health(False, {}), "the agent was connected before, and is not now"),
        (Health(True, {"a": "failed"}), Health(True, {"a": "failed"}), ""),
        (Health(True, {"a": "failed"}), Health(True, {}), ""),
        (Health(True, {"a": "starting"}), Health(True, {"a": "failed"}), ""),
        (
            Health(True, {"a": "ok"}),
            Health(True, {"a": "starting"}),
            "module a was ok before, and is starting now",
        ),
        (Health(True, {"a": "ok"}), Health(True, {"b": "ok"}), "module a was ok before, and is gone now"),
        (Health(True, {"a": "ok"}), Health(True, {"a": "ok", "b": "failed"}), ""),
    ],
)
def test_only_what_got_worse_counts(before: Health, now: Health, worse: str) -> None:
    assert now.worse_than(before) == worse


# --- the lease


def test_the_lease_runs_on_boot_time() -> None:
    assert LEASE.spent("boot-1", 1000.0) == 0.0
    assert LEASE.spent("boot-1", 1030.0) == 30.0
    assert LEASE.spent("boot-1", 990.0) == 0.0  # never below nothing


def test_a_mark_keeps_what_was_spent() -> None:
    marked = LEASE.marked("boot-1", 1030.0)
    assert marked.spent("boot-1", 1030.0) == 30.0
    assert marked.spent("boot-1", 1040.0) == 40.0


def test_another_boot_counts_from_its_first_mark_on_top_of_the_last_one() -> None:
    """A machine that takes long to boot does not lose its lease by that."""
    assert LEASE.spent("boot-2", 7.0) == 0.0
    assert LEASE.marked("boot-1", 1030.0).spent("boot-2", 700.0) == 30.0
    again = LEASE.marked("boot-1", 1030.0).marked("boot-2", 700.0)
    assert again.spent("boot-2", 703.0) == 33.0
    assert again.spent("boot-3", 10.0) == 30.0


@given(st.lists(st.tuples(st.booleans(), st.floats(0.001, 500)), max_size=20))
def test_what_is_marked_never_shrinks_and_never_exceeds_the_time_that_passed(
    steps: list[tuple[bool, float]],
) -> None:
    lease, boot, now, passed, spent = LEASE, 1, 1000.0, 0.0, 0.0
    for reboots, seconds in steps:
        if reboots:
            boot, now = boot + 1, seconds  # the boot itself, up to its first mark, does not count
        else:
            now, passed = now + seconds, passed + seconds
        lease = lease.marked(f"boot-{boot}", now)
        assert spent <= lease.spent_s <= passed + 1e-6
        spent = lease.spent_s
    assert spent == pytest.approx(passed)
