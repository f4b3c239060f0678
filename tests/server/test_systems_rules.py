"""What may be ordered of a node's system, and what its words make of an order: without a server."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from instar.core.errors import InputError
from instar_server.domain import systems
from instar_server.domain.errors import Precondition
from instar_server.domain.systems import Told, Update
from instar_server.domain.verdicts import system_trial
from tests.server.systems import at_work, report, slot

MADE = Update("os-1", "n", 7, "web", "1.1.0", "d" * 96, "os/web-1.1.0.bundle", "", "reboot", False, 1.0, "me")


@pytest.mark.parametrize(
    ("said", "target", "source"),
    [
        ("web-1.1.0", "os/web-1.1.0.bundle", ""),
        ("my-web-1.1.0-rc1", "os/my-web-1.1.0-rc1.bundle", ""),
        ("os/web-1.1.0.bundle", "os/web-1.1.0.bundle", ""),
        ("https://h:8443/a/web-1.1.0.bundle", "os/web-1.1.0.bundle", "https://h:8443/a/web-1.1.0.bundle"),
        ("https://h/web-1.1.0.bundle?sig=a/b", "os/web-1.1.0.bundle", "https://h/web-1.1.0.bundle?sig=a/b"),
    ],
)
def test_a_bundle_has_three_names(said: str, target: str, source: str) -> None:
    assert systems.asked(said) == (target, source)


@pytest.mark.parametrize(
    "said",
    [
        None, "", 5, [], {"a": 1}, "web", "web-1", "web-1.1.0.bundle", "os/web-1.1.0", "os/../x-1.1.0.bundle",
        "a/b-1.1.0", "os/a/b-1.1.0.bundle", "http://h/web-1.1.0.bundle", "https://u@h/web-1.1.0.bundle",
        "https://h/web-1.1.0", "https://h/web-1.1.0.bundle#x", "https://h/web%2f-1.1.0.bundle", "https:///web-1.1.0.bundle",
        "ftp://h/web-1.1.0.bundle", "x" * 3000 + "-1.1.0", "we\nb-1.1.0", "we\\b-1.1.0", "w:b-1.1.0",
    ],
)  # fmt: skip
def test_what_is_no_bundle_is_an_invalid_argument(said: Any) -> None:
    with pytest.raises(InputError) as caught:
        systems.asked(said)
    assert caught.value.code == "invalid-argument"
    assert len(caught.value.text) < 600


@pytest.mark.parametrize(
    ("compatible", "arch", "least", "current", "why"),
    [
        (("board-7",), "x86_64", "", True, ""),
        (("virtual", "x"), "x86_64", "1.0.0", True, ""),
        (("board-8",), "x86_64", "", True, "wrong-hardware"),
        (("board-7",), "aarch64", "", True, "wrong-hardware"),
        (("board-7",), "x86_64", "1.0.1", True, "too-old-system"),
        (("board-7",), "x86_64", "1.0.1", False, ""),  # it may have moved on since it told
    ],
)
def test_what_cannot_fit_is_refused_as_far_as_is_known(
    compatible: tuple[str, ...], arch: str, least: str, current: bool, why: str
) -> None:
    def check(said: dict[str, Any]) -> None:
        systems.check_fits(said, "b", compatible, arch, least, current)

    if why:
        with pytest.raises(Precondition, match=why):
            check(report())
    else:
        check(report())
    check(report(hardware=[], arch="", running=""))  # nothing is known: the node decides
    check(report(hardware=[], arch="", slots={"a": slot(version="strange")}))


def heard(update: Update, *told: tuple[str, int, str, str]) -> Update:
    for tx, number, phase, code in told:
        said = Told(tx, number, update.generation, phase, code, f"text of {code}" if code else "", "b")
        update = systems.after(update, said, 50.0)
    return update


GOOD = [(f"t:{n}", n, phase, "") for n, phase in enumerate(
    ("offered", "staged", "verified", "rehearsed", "trial", "confirming", "confirmed"), 1)]  # fmt: skip
GOOD = [("t", n, phase, code) for _, n, phase, code in GOOD]


def test_a_confirmed_update_ends_and_stays_so() -> None:
    done = heard(MADE, *GOOD)
    assert (done.state, done.phase, done.slot, done.activated, done.ended) == (
        "confirmed", "confirmed", "b", True, 50.0,
    )  # fmt: skip
    assert heard(done, ("t", 9, "reverted", "late")) == done
    assert systems.outcome(done, {}) == "confirmed"


def test_events_may_come_in_any_order_and_again() -> None:
    whole = heard(MADE, *GOOD)
    bad = [
        ("t", 1, "offered", ""),
        ("t", 2, "trial", ""),
        ("t", 3, "reverting", "why"),
        ("t", 4, "reverted", ""),
    ]
    went_back = heard(MADE, *bad)
    for events, good in ((GOOD[3:], whole), (bad, went_back)):
        for mixed in itertools.permutations(events):
            end = heard(MADE, *mixed, *events)
            assert (end.state, end.phase) == (good.state, good.phase)
    assert heard(MADE, *GOOD[:3], *GOOD[:2]).phase == "verified"


def test_the_first_failure_is_why() -> None:
    back = heard(
        MADE, ("t", 1, "rehearsed", "kexec-denied"), ("t", 2, "trial", ""), ("t", 3, "reverting", "fell-back"),
        ("t", 4, "reverting", "noise"), ("t", 5, "reverted", "more-noise"),
    )  # fmt: skip
    assert (back.code, back.text, back.state) == ("fell-back", "text of fell-back", "reverted")
    assert systems.outcome(back, {}) == "reverted"  # it had been active


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("altered-bundle", "unavailable"), ("cut-off", "unavailable"), ("", "unavailable"),
        ("wrong-hardware", "failed-precondition"), ("too-old-system", "failed-precondition"),
        ("too-old-bundle", "failed-precondition"), ("slot-too-small", "failed-precondition"),
        ("cold-boot-not-seen", "failed-precondition"),
    ],
)  # fmt: skip
def test_an_end_before_the_switch_has_the_fields_codes(code: str, outcome: str) -> None:
    ended = heard(MADE, ("t", 1, "offered", ""), ("t", 2, "reverting", code), ("t", 3, "reverted", ""))
    assert (ended.state, ended.code, systems.outcome(ended, {})) == ("reverted", code, outcome)


def test_how_it_was_started_counts_after_a_confirmation() -> None:
    done = heard(MADE, *GOOD)
    by_kexec = slot("1.1.0", "d" * 96, booted_by="kexec", cold_boot_seen=False)
    assert systems.outcome(done, report(slots={"b": by_kexec})) == "confirmed, cold boot not seen"
    assert systems.outcome(done, report(slots={"b": by_kexec | {"cold_boot_seen": True}})) == "confirmed"
    assert systems.outcome(done, report(slots={"b": by_kexec | {"digest": "e" * 96}})) == "confirmed"
    assert systems.outcome(replace(done, mode="none"), report()) == "installed, not active"
    assert systems.outcome(MADE, report()) == ""


@pytest.mark.parametrize("by", ["kexec", "firmware"])
def test_a_system_that_was_left_later_is_not_shown_as_confirmed(by: str) -> None:
    """The firmware did not start what kexec had; no event tells of it, the slot's record does."""
    done = heard(MADE, *GOOD)
    bad = slot(
        "1.1.0", "d" * 96, state="bad", booted_by=by, cold_boot_seen=False, why="never by the firmware"
    )
    shown = systems.as_json(done, report(slots={"a": slot(), "b": bad}))
    assert (shown["state"], shown["outcome"]) == ("confirmed", "left")
    assert (shown["code"], shown["text"]) == ("left", "never by the firmware")
    other = systems.as_json(done, report(slots={"b": bad | {"digest": "e" * 96}}))
    assert (other["outcome"], other["code"]) == ("confirmed", "")


def test_a_system_that_was_left_after_its_trial_is_not_confirmed() -> None:
    """It passed, the machine was to come back to it, and did not: the node stays on the old one for good."""
    left = heard(MADE, *GOOD[:-1], ("t", 7, "confirmed", "fell-back"))
    assert (left.state, left.code, left.ended) == ("reverted", "fell-back", 50.0)
    assert systems.outcome(left, report()) == "reverted"


@pytest.mark.parametrize("end", ["confirmed", "reverted"])
def test_a_way_back_to_another_system_does_not_confirm_the_order_that_it_went_against(end: str) -> None:
    """A rollback that was ordered on the node has the generation of the wish that it overrules."""

    def told(number: int, phase: str) -> Told:
        return Told("back", number, 7, phase, digest="e" * 96)

    update = systems.after(systems.after(MADE, told(1, "trial"), 40.0), told(2, end), 50.0)
    assert (update.state, update.code, update.ended) == ("reverted", "superseded", 50.0)
    assert systems.outcome(update, {}) == "unavailable"
    gone = replace(MADE, state="cancelled", ended=9.0)
    assert systems.after(gone, told(2, end), 50.0) == gone


def test_what_was_cancelled_stays_so_unless_it_was_done_all_the_same() -> None:
    gone = replace(heard(MADE, *GOOD[:2]), state="cancelled", ended=9.0)
    back = heard(gone, ("t", 3, "reverting", "cancelled"), ("t", 4, "reverted", ""))
    assert (back.state, back.code, back.ended) == ("cancelled", "cancelled", 9.0)
    assert heard(gone, *GOOD).state == "confirmed"


def test_when_it_is_too_late_to_cancel() -> None:
    for phase in ("", "offered", "staged", "verified", "rehearsed"):
        assert not systems.too_late(replace(MADE, phase=phase), report(update=at_work("t", 7)))
    for phase in ("trial", "confirming", "reverting"):
        assert systems.too_late(replace(MADE, phase=phase), {})
    for step in ("activate", "watch", "confirm", "revert"):
        assert systems.too_late(MADE, report(update=at_work("t", 7, step)))
        assert not systems.too_late(MADE, report(update=at_work("t", 6, step)))


def test_what_a_node_is_told() -> None:
    plain = {
        "version": "1.1.0", "digest": "d" * 96, "target": "os/web-1.1.0.bundle", "generation": 7, "mode": "reboot",
    }  # fmt: skip
    assert systems.as_wire(MADE) == plain
    assert systems.as_wire(replace(MADE, source="https://h/x", override=True)) == plain | {
        "source": "https://h/x", "override": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    "at", [float("nan"), float("inf"), -float("inf"), 0.0, 1e300, 1e9 - 301, 1e9 + 367 * 86400]
)
def test_a_cold_boot_is_in_the_future(at: float) -> None:
    assert systems.check_time(None, 1e9) == 1e9
    assert systems.check_time(1e9 - 200, 1e9) == 1e9 - 200
    with pytest.raises(InputError) as caught:
        systems.check_time(at, 1e9)
    assert caught.value.code == "invalid-argument"


def test_the_verdict_never_fails_a_system() -> None:
    said = [
        system_trial(live, "this")
        for live in (None, ("other", True), ("this", None), ("this", False), ("this", True))
    ]
    assert [(each.verdict, each.code) for each in said] == [
        ("wait", "not-connected"), ("wait", "other-boot"), ("wait", "no-health-yet"), ("wait", "not-well"),
        ("pass", "as-expected"),
    ]  # fmt: skip
