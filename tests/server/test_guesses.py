"""Wrong tokens: how many are borne, for how long, and how little of them is remembered."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from instar_server.domain.guesses import IN_ALL, MOST_SOURCES, RETRY_FLOOR_S, WINDOW_S, Guesses, source_of
from tests.server.world import Node, running


def test_a_source_that_was_wrong_too_often_waits_and_then_may_try_again() -> None:
    guesses, now = Guesses(10), 1000.0
    for _ in range(10):
        assert guesses.wait_s("a", now) == 0
        guesses.wrong("a", now)
    wait_s = guesses.wait_s("a", now)
    assert RETRY_FLOOR_S <= wait_s <= WINDOW_S
    assert guesses.wait_s("b", now) == 0
    assert guesses.wait_s("a", now + wait_s / 2) > 0
    assert guesses.wait_s("a", now + wait_s) == 0


def test_many_sources_together_are_bounded_too() -> None:
    guesses, now = Guesses(1), 1000.0
    for number in range(IN_ALL):
        assert guesses.wait_s(f"s{number}", now) == 0
        guesses.wrong(f"s{number}", now)
    assert guesses.wait_s("another", now) >= RETRY_FLOOR_S
    assert guesses.wait_s("another", now + WINDOW_S) == 0


def test_memory_is_bounded_and_the_newest_are_kept() -> None:
    guesses = Guesses(1, in_all=10**9)
    for number in range(MOST_SOURCES + 500):
        guesses.wrong(f"s{number}", 1000.0)
    assert len(guesses) == MOST_SOURCES
    assert guesses.wait_s("s0", 1000.0) == 0
    assert guesses.wait_s(f"s{MOST_SOURCES + 499}", 1000.0) > 0


@given(st.lists(st.floats(0, 100), max_size=60), st.integers(1, 12))
def test_no_more_wrong_tokens_pass_than_the_bucket_and_its_drain(steps: list[float], most: int) -> None:
    guesses, now, passed = Guesses(most), 0.0, 0
    for step in steps:
        now += step
        if guesses.wait_s("a", now) == 0:
            guesses.wrong("a", now)
            passed += 1
    assert passed <= most + now * most / WINDOW_S + 1e-6


def test_addresses_of_one_source() -> None:
    assert source_of("192.0.2.7") == source_of("::ffff:192.0.2.7") == "192.0.2.7"
    assert source_of("2001:db8::1") == source_of("2001:db8::ffff:1") != source_of("2001:db8:0:1::1")
    assert source_of("fe80::1%eth0") == source_of("fe80::2")
    assert source_of(None) == source_of("nonsense") == ""


def test_the_server_keeps_a_guesser_out_on_both_ports(tmp_path: Path) -> None:
    with running(tmp_path, wrong_tokens=3) as world:
        world.publish("1.0.0")
        good = world.token()
        for number in range(3):
            refused = Node(world, tmp_path / f"guess{number}").enrol(f"guess-{number}")
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "token-unknown")
        kept_out = Node(world, tmp_path / "good").enrol(good)  # a good token does not show itself either
        with world.api() as api:
            program = api.get("/program", params={"token": good})
        for answer in (kept_out, program):
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too-many-guesses")
            assert RETRY_FLOOR_S <= int(answer.headers["Retry-After"]) <= WINDOW_S
        assert world.stop() == 0
