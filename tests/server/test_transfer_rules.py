"""Window, rate and resumption by themselves: events and times in, blocks out."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.wire.messages import FORCE, NEVER, UpdateHave, UpdateOffer, UpdateState
from instar_server.domain import looks, transfers
from instar_server.domain.looks import Observed
from instar_server.domain.transfers import End, Over, Rest, Send, State, Transfer, Wait, rest
from instar_server.domain.wanted import Wish, as_wire

A, B = "a" * 96, "b" * 96


def make(length: int = 10_000, line: str = "agent", **offered: Any) -> Transfer:
    fields = {"block": 1024, "window": 4, **offered}
    return Transfer(UpdateOffer("u-1", line, "1.0.0", A, "node/x", length, "c" * 96, **fields), 100.0)


def have(digest: str = B, at: int = 0, block: int = 1024, window: int = 4, rate: int = 0) -> UpdateHave:
    return UpdateHave("u-1", digest, at, block, window, rate)


def test_the_example() -> None:
    assert doctest.testmod(transfers).failed == 0


def test_a_window_goes_out_and_acks_move_it() -> None:
    transfer = make()
    assert transfer.next(100.0) == Wait(160.0)
    transfer.have(have(), 101.0)
    assert [transfer.next(101.0) for _ in range(4)] == [Send(n, n * 1024, 1024) for n in range(4)]
    assert transfer.next(101.0) == Wait(161.0)
    transfer.ack(2, 102.0)
    assert [transfer.next(102.0) for _ in range(2)] == [Send(n, n * 1024, 1024) for n in (4, 5)]
    assert transfer.next(102.0) == Wait(162.0)
    transfer.ack(1, 103.0)  # an old word
    assert (transfer.acked, transfer.next(103.0)) == (2, Wait(162.0))
    transfer.ack(6, 104.0)
    sent = [transfer.next(104.0) for _ in range(4)]
    assert sent[-1] == Send(9, 9216, 784)
    assert transfer.next(104.0) == End()
    assert transfer.next(104.0) == Wait(164.0)
    transfer.ack(10, 105.0)
    assert transfer.next(105.0) == Wait(405.0)  # now it checks
    transfer.word(UpdateState("u-1", "received"), 106.0)
    assert (transfer.state, transfer.next(106.0), transfer.bytes) == (State.RECEIVED, Over(), 10_000)


@given(
    length=st.integers(1, 60_000),
    block=st.integers(1024, 9000),
    window=st.integers(1, 9),
    before=st.integers(0, 60),
    acks=st.lists(st.integers(0, 12), max_size=200),
)
def test_every_block_goes_once_in_order_and_never_more_than_the_window(
    length: int, block: int, window: int, before: int, acks: list[int]
) -> None:
    transfer = make(length, block=16_384, window=16)
    blocks = -(-length // block)
    first = min(before, blocks)
    transfer.have(have(at=first, block=block, window=window), 100.0)
    sent: list[Send] = []
    pending = iter(acks)
    for _ in range(1000):
        match transfer.next(100.0):
            case Send() as step:
                sent.append(step)
                assert transfer.sent - transfer.acked <= window
            case Wait():
                transfer.ack(min(transfer.sent, transfer.acked + next(pending, window)), 100.0)
            case End():
                break
    assert [step.n for step in sent] == list(range(first, blocks))
    assert sum(step.size for step in sent) == max(0, length - first * block)


def test_a_rate_is_kept_and_the_lower_one_counts() -> None:
    transfer = make(rate_bytes_s=4096)
    transfer.have(have(rate=2048), 100.0)
    now, went = 100.0, []
    for _ in range(100):
        match transfer.next(now):
            case Send(n, _, _):
                went.append(now)
                transfer.ack(n + 1, now)
            case Wait(until):
                assert until < now + 1
                now = until
            case End():
                break
    assert went == [100.0 + n * 0.5 for n in range(10)]
    assert 2000 < transfer.pace(now) < 2300


def test_a_slow_cap_is_no_silence() -> None:
    """A block may take longer than an ack may: nothing is owed while nothing is under way."""
    transfer = make(200_000, block=65_536, rate_bytes_s=1024)
    transfer.have(have(block=65_536), 100.0)
    assert transfer.next(100.0) == Send(0, 0, 65_536)
    transfer.ack(1, 101.0)
    assert transfer.next(101.0) == Wait(164.0)
    assert transfer.next(164.0) == Send(1, 65_536, 65_536)
    assert transfer.next(164.0) == Wait(224.0)


@pytest.mark.parametrize(("server", "node"), [(0, 1), (1, 0), (1, 1), (4096, 1)])
def test_a_cap_has_a_floor(server: int, node: int) -> None:
    transfer = make(rate_bytes_s=server)
    transfer.have(have(rate=node), 100.0)
    assert transfer.rate == 1024
    assert transfer.next(100.0) == Send(0, 0, 1024)
    assert transfer.next(100.0) == Wait(101.0)


@pytest.mark.parametrize(("rate", "whole"), [(0, 320.0), (1, 320.0), (2048, 220.0)])
def test_the_whole_has_a_bound(rate: int, whole: float) -> None:
    """102,400 bytes at the rate, twice, and 120 s: one block a minute is an answer, but no way to keep a place."""
    transfer, now = make(102_400), 100.0
    transfer.have(have(rate=rate), now)
    while (step := transfer.next(now)) != Over():
        if isinstance(step, Wait):
            assert step.until <= 100.0 + whole
            transfer.ack(min(transfer.sent, transfer.acked + 1), now)
            now = min(now + 50.0, 100.0 + whole)
        assert now <= 100.0 + whole
    assert (transfer.state, transfer.code) == (State.FAILED, "too-slow")
    assert (now, "of 100 blocks" in transfer.text) == (100.0 + whole, True)


def test_the_bound_is_for_what_is_left_and_not_for_the_check() -> None:
    transfer = make(102_400)
    transfer.have(have(at=99), 100.0)
    assert [transfer.next(100.0), transfer.next(100.0)] == [Send(99, 101_376, 1024), End()]
    transfer.ack(100, 150.0)
    assert transfer.next(299.0) == Wait(450.0)
    transfer = make(102_400, window=64)
    transfer.have(have(at=90, window=64), 100.0)
    while not isinstance(transfer.next(100.0), End):
        continue
    for n, now in ((91, 150.0), (92, 200.0)):  # all sent, and acknowledged one by one
        transfer.ack(n, now)
        assert transfer.next(now) == Wait(min(now + 60.0, 240.0))
    assert transfer.next(240.0) == Over()
    assert transfer.code == "too-slow"


@pytest.mark.parametrize(
    ("line", "said", "state", "code"),
    [
        ("agent", have(NEVER), State.DECLINED, "never"),
        ("recovery", have(NEVER), State.DECLINED, "never"),
        ("agent", have(A), State.NOT_NEEDED, ""),
        ("recovery", have(A), State.SENDING, ""),
        ("agent", have(FORCE), State.SENDING, ""),
        ("agent", have(block=9999), State.SENDING, ""),
        ("agent", have(window=99), State.SENDING, ""),
        ("agent", have(block=1023), State.FAILED, "bad-have"),
        ("agent", have(block=-1), State.FAILED, "bad-have"),
        ("agent", have(window=0), State.FAILED, "bad-have"),
        ("agent", have(at=11), State.FAILED, "bad-have"),
        ("agent", have(at=-1), State.FAILED, "bad-have"),
        ("agent", have(rate=-1), State.FAILED, "bad-have"),
    ],
)
def test_what_answers_lead_to(line: str, said: UpdateHave, state: State, code: str) -> None:
    transfer = make(line=line)
    transfer.have(said, 101.0)
    assert (transfer.state, transfer.code) == (state, code)
    if state is State.SENDING:
        assert (transfer.block, transfer.window, transfer.blocks) == (1024, 4, 10)


def test_silence_ends_it() -> None:
    transfer = make()
    assert transfer.next(159.9) == Wait(160.0)
    assert transfer.next(160.0) == Over()
    assert transfer.code == "no-answer"
    transfer = make()
    transfer.have(have(), 101.0)
    assert transfer.next(101.0) == Send(0, 0, 1024)
    assert transfer.next(161.0) == Over()
    assert (transfer.state, transfer.code) == (State.FAILED, "no-ack")


def test_words_out_of_turn() -> None:
    transfer = make()
    transfer.ack(3, 101.0)  # before the answer
    assert transfer.state is State.OFFERED
    transfer.have(have(), 101.0)
    transfer.have(have(at=5), 101.0)
    assert transfer.sent == 0
    transfer.ack(1, 101.0)  # nothing was sent
    assert transfer.code == "bad-ack"
    transfer.word(UpdateState("u-1", "received"), 102.0)
    assert transfer.state is State.FAILED
    transfer = make()
    transfer.have(have(), 101.0)
    transfer.word(UpdateState("u-1", "failed", "disk-full", "no room"), 102.0)
    assert (transfer.state, transfer.code, transfer.text) == (State.FAILED, "disk-full", "no room")
    transfer = make()
    transfer.word(UpdateState("u-1", "dancing"), 102.0)
    assert transfer.code == "bad-state"


def test_rests_grow_and_a_new_wish_does_not_wait() -> None:
    now, before = 1000.0, None
    waits = []
    for _ in range(9):
        before = rest(before, 7, "failed", now, 0.0)
        waits.append(before.until - now)
    assert waits == [5, 10, 20, 40, 80, 160, 320, 600, 600]
    assert before is not None
    assert not before.over(7, now + 599)
    assert before.over(8, now)
    assert rest(before, 8, "failed", now, 1.0) == Rest(8, 1, now + 6.25)
    assert rest(before, 7, "cut", now, 0.0).tries == 10
    assert rest(before, 7, "moved", now, 0.0).over(7, now)
    assert rest(None, 7, "received", now, 0.0).until == now + 60
    assert rest(before, 7, "failed", before.until + 3601, 0.0).tries == 1


# ---- who is sent what


def wish(line: str, generation: int, via: str) -> Wish:
    return Wish("group", "g", line, "1.0.0", "node/x", A, generation, 0.0, "me", via)


def test_what_is_sent_is_no_reason_for_a_look() -> None:
    node = Observed("n", "g", {"agent": B, "updater": B})
    native = [wish("agent", 5, "native"), wish("updater", 4, "native")]
    assert looks.decide(native, [node], 0.0, looks.LookRules()) == []
    (found,) = looks.to_send(native, [node])
    assert [each.line for each in found.wishes] == ["updater", "agent"]
    assert not found.at_work
    (found,) = looks.to_send(native, [Observed("n", "g", {"agent": B, "updater": A}, tx_phase="trial")])
    assert ([each.line for each in found.wishes], found.at_work) == (["agent"], True)


def test_what_a_forced_node_has_is_sent_again_if_it_comes_through_the_channel() -> None:
    wishes = [wish("agent", 5, "native"), wish("updater", 4, "native")]
    has = {"agent": A, "updater": A}
    for forced, lines in ((False, []), (True, ["updater", "agent"])):
        (found,) = looks.to_send(wishes, [Observed("n", "g", has, forced=forced)])
        assert ([each.line for each in found.again], found.wishes) == (lines, ())
    (found,) = looks.to_send(wishes, [Observed("n", "g", {"agent": B, "updater": A}, forced=True)])
    assert [each.line for each in found.wishes] == ["agent"]
    assert [each.line for each in found.again] == ["updater"]
    pull = [wish("agent", 5, "pull"), wish("updater", 4, "recovery")]
    (found,) = looks.to_send(pull, [Observed("n", "g", has, forced=True)])
    assert found.again == ()


def test_a_node_in_trouble_is_sent_what_it_would_fetch() -> None:
    pull = [wish("agent", 5, "pull"), wish("module/x", 6, "pull")]
    for trouble, lines in ((False, []), (True, ["agent"])):
        node = Observed("n", "g", {"agent": B}, tx_phase="offered", trouble=trouble)
        (found,) = looks.to_send(pull, [node])
        assert ([each.line for each in found.wishes], found.at_work) == (lines, False)
        assert looks.decide(pull, [node], 0.0, looks.LookRules())


def test_wanted_names_the_way_and_the_place_only_when_they_are_not_the_usual() -> None:
    wishes = {"agent": wish("agent", 5, "native"), "updater": wish("updater", 4, "pull")}
    told = as_wire("n", wishes, 300.0)
    assert told["lines"]["agent"]["via"] == "native"
    assert "via" not in told["lines"]["updater"]
    assert "artifacts" not in told
    assert as_wire("n", wishes, 300.0, "https://h:1")["artifacts"] == "https://h:1"
