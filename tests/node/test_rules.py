"""The small pure rules: versions, quarantine, backoff, wishes, settings."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.core import quarantine
from instar.core.backoff import Backoff
from instar.core.errors import InputError
from instar.core.journal import Reason
from instar.core.quarantine import FIRST_S, LONGEST_S, Entry
from instar.core.releases import Release, is_release_name, version_key, version_of
from instar.core.settings import BOUNDS, Settings, read_settings
from instar.core.wish import read_wanted

DIGEST = "0123456789ab" * 8
WHY = Reason("rehearsal-failed", "it ended with status 3")


# --- versions


def test_versions_are_ordered_by_their_numbers() -> None:
    order = ["0.9.0", "1.0.0-alpha", "1.0.0-rc1", "1.0.0", "1.0.1", "1.2.0", "1.10.0", "10.0.0"]
    assert sorted(order, key=version_key) == order
    order.reverse()
    assert sorted(order, key=version_key) == order[::-1]


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "1",
        "1.0",
        "1.0.0.0",
        "v1.0.0",
        "1.0.0-",
        "1.0.0-RC",
        "01.0.0",
        "1.0.0\n",
        "1.0.0-a/b",
        "-1.0.0",
        "٣.0.0",
    ],
)
def test_bad_versions_are_named(bad: str) -> None:
    with pytest.raises(InputError, match="expected N") as caught:
        version_key(bad)
    assert caught.value.code == "bad-version"
    assert repr(bad) in caught.value.text


@pytest.mark.parametrize("bad", ["", "ab", DIGEST.upper(), DIGEST + "0", DIGEST[:-1] + "g", DIGEST + "\n"])
def test_bad_digests_are_refused(bad: str) -> None:
    with pytest.raises(InputError) as caught:
        Release("1.0.0", bad)
    assert caught.value.code == "bad-digest"


def test_a_releases_name_is_version_and_the_start_of_its_digest() -> None:
    assert Release("1.0.0-rc1", DIGEST).name == "1.0.0-rc1-0123456789ab"
    assert version_of("1.0.0-rc1-0123456789ab") == "1.0.0-rc1"
    assert is_release_name("1.0.0-rc1-0123456789ab")


@pytest.mark.parametrize(
    "name",
    ["", "..", "1.0.0", "1.0.0-012", "a/1.0.0-0123456789ab", "1.0.0-0123456789ab\n", ".1.0.0-0123456789ab"],
)
def test_other_names_are_no_releases(name: str) -> None:
    assert not is_release_name(name)


# --- quarantine


def test_a_failure_keeps_a_release_away_for_a_while_that_doubles_to_a_week() -> None:
    entries: dict[str, Entry] = {}
    lengths = []
    for _ in range(12):
        entries = quarantine.add(entries, "agent:x", "1.1.0", WHY, 1000.0)
        lengths.append(entries["agent:x"].until - 1000.0)
    assert lengths[:4] == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S, 8 * FIRST_S]
    assert lengths[-1] == LONGEST_S
    assert entries["agent:x"].count == 12


def test_an_entry_ends_by_itself() -> None:
    entries = quarantine.add({}, "agent:x", "1.1.0", WHY, 1000.0)
    entry = quarantine.keeps_out(entries, "agent:x", 1000.0 + FIRST_S - 1)
    assert entry is not None
    assert entry.reason == WHY
    assert quarantine.keeps_out(entries, "agent:x", 1000.0 + FIRST_S) is None
    assert quarantine.keeps_out(entries, "agent:y", 1000.0) is None
    assert quarantine.keeps_out(entries, "updater:x", 1000.0) is None


def test_others_are_left_as_they_are() -> None:
    first = quarantine.add({}, "agent:x", "1.1.0", WHY, 1000.0)
    both = quarantine.add(first, "agent:y", "1.2.0", WHY, 2000.0)
    assert both["agent:x"] == first["agent:x"]
    assert set(first) == {"agent:x"}


# --- backoff


@given(st.floats(0.01, 10), st.floats(1, 4), st.floats(10, 100), st.lists(st.floats(0, 1), max_size=30))
def test_a_wait_never_leaves_its_bounds(
    floor: float, factor: float, cap: float, chances: list[float]
) -> None:
    backoff = Backoff(floor, factor, cap)
    for chance in chances:
        assert floor <= backoff.next(chance) <= cap


def test_waits_grow_and_start_again_after_a_reset() -> None:
    backoff = Backoff(1.0, 2.0, 8.0)
    assert [backoff.next(1.0) for _ in range(5)] == [1.0, 2.0, 4.0, 8.0, 8.0]
    backoff.reset()
    assert backoff.next(1.0) == 1.0
    assert Backoff(4.0, 2.0, 8.0).next(0.0) == 4.0  # the floor, not half of it


@pytest.mark.parametrize("numbers", [(0.0, 2.0, 1.0), (-1.0, 2.0, 1.0), (2.0, 2.0, 1.0), (1.0, 0.5, 2.0)])
def test_a_backoff_without_a_floor_cannot_be_made(numbers: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="floor"):
        Backoff(*numbers)


# --- wishes


def wished(**changes: Any) -> dict[str, Any]:
    return {"version": "1.1.0", "digest": DIGEST, "target": "node/x.tar.gz", "generation": 3, **changes}


def test_the_updater_comes_first_and_unknown_lines_are_passed_over() -> None:
    body = {
        "v": 1,
        "lines": {"agent": wished(), "moon": {"x": 1}, "updater": wished(more=True)},
        "poll_s": 60,
    }
    wanted = read_wanted(body)
    assert [w.line for w in wanted.wishes] == ["updater", "agent"]
    assert wanted.wishes[0].release == Release("1.1.0", DIGEST)
    assert wanted.poll_s == 60.0


@pytest.mark.parametrize(
    ("said", "poll_s"), [(0, 1.0), (-5, 1.0), (1e9, 86400.0), ("30", 30.0), (float("nan"), 1.0)]
)
def test_the_poll_has_bounds(said: Any, poll_s: float) -> None:
    assert read_wanted({"lines": {}, "poll_s": said}).poll_s == poll_s


@pytest.mark.parametrize(
    "body",
    [
        None, [], "x", {}, {"lines": []}, {"lines": {"agent": {}}}, {"lines": {"agent": []}},
        {"lines": {"agent": wished(version="../x")}}, {"lines": {"agent": wished(digest="x")}},
        {"lines": {"agent": wished(generation="many")}}, {"lines": {}, "poll_s": "soon"},
    ],
)  # fmt: skip
def test_a_bad_answer_is_refused(body: Any) -> None:
    with pytest.raises(InputError):
        read_wanted(body)


# --- settings


def test_no_document_means_the_defaults() -> None:
    assert read_settings({}) == Settings()


def test_values_are_taken_and_whole_numbers_become_seconds() -> None:
    settings = read_settings({"trial": {"hold_s": 2, "attempts": 5}, "network": {"proxy": "http://p:1"}})
    assert settings.trial.hold_s == 2.0
    assert isinstance(settings.trial.hold_s, float)
    assert settings.trial.attempts == 5
    assert settings.network.proxy == "http://p:1"


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"trail": {}}, "'trail'"),
        ({"trial": 5}, "[trial]"),
        ({"trial": {"hold": 1}}, "'hold'"),
        ({"trial": {"hold_s": "long"}}, "trial.hold_s"),
        ({"trial": {"hold_s": True}}, "trial.hold_s"),
        ({"trial": {"attempts": 1.5}}, "trial.attempts"),
        ({"network": {"proxy": 5}}, "network.proxy"),
        ({"trial": {"hold_s": float("nan")}}, "trial.hold_s"),
        ({"trial": {"lease_s": 50.0, "cap_s": 10.0}}, "cap_s"),
        ({"trial": {"lease_s": 5.0}}, "hold_s <= lease_s"),
        ({"updater": {"retry_floor_s": 10.0, "retry_cap_s": 1.0}}, "retry_floor_s"),
    ],
)
def test_a_bad_value_is_refused_and_its_key_named(document: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as caught:
        read_settings(document)
    assert caught.value.code == "bad-config"
    assert named in caught.value.text


@pytest.mark.parametrize("path", list(BOUNDS))
def test_each_bound_holds(path: str) -> None:
    section, key = path.split(".")
    low, high = BOUNDS[path]
    whole = isinstance(low, int)
    for value in (low - 1, high * 2):
        with pytest.raises(InputError) as caught:
            read_settings({section: {key: int(value) if whole else value}})
        assert path in caught.value.text
