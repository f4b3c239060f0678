"""core.journal: lines to records to progress."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.core.errors import InputError
from instar.core.journal import (
    Begin,
    Moment,
    Reason,
    Record,
    decode,
    decode_line,
    encode,
    fold,
    timeline,
)
from instar.core.transaction import STEP, Event, State, Step, after

AT = Moment("boot-1", 10.5, 1_700_000_000.0)
BEGIN = Begin("tx-1", "agent", "1.1.0", "ab" * 48, "node/x.tar.gz", "1.0.0-000000000000", "", "wish", 3)


def begin() -> Record:
    return Record("begin", AT, data=asdict(BEGIN))


def intent(step: Step) -> Record:
    return Record("intent", AT, step.value)


def done(step: Step, **data: Any) -> Record:
    return Record("outcome", AT, step.value, "done", None, data)


def failed(step: Step, code: str = "bad") -> Record:
    return Record("outcome", AT, step.value, "failed", Reason(code, "it is"), {"blame": True})


def note(reason: Reason | None = None, **data: Any) -> Record:
    return Record("note", AT, reason=reason, data=data)


def upto(state: State) -> list[Record]:
    """The records of a good run that has reached `state`."""
    records, now = [begin()], State.OFFERED
    while now is not state:
        records += [intent(STEP[now]), done(STEP[now])]
        now = after(now, Event.DONE)
    return records


RECORDS = [*upto(State.TRIAL), note(Reason("trial-stretched", "the net"), x=[1]), failed(Step.WATCH)]

records_of_any_kind = st.builds(
    Record,
    kind=st.sampled_from(["begin", "intent", "outcome", "note"]),
    at=st.builds(Moment, st.text(max_size=5), st.floats(0, 1e9), st.floats(0, 1e10)),
    step=st.sampled_from(["", "stage", "revert"]),
    event=st.sampled_from(["", "done", "failed"]),
    reason=st.none() | st.builds(Reason, st.text(max_size=8), st.text()),
    data=st.dictionaries(st.text(max_size=6), st.integers() | st.text() | st.lists(st.booleans())),
)


@given(st.lists(records_of_any_kind, max_size=6))
def test_what_is_encoded_is_decoded(records: list[Record]) -> None:
    data = b"".join(encode(r) for r in records)
    assert decode(data) == (records, len(data))


@given(records_of_any_kind)
def test_a_record_is_one_line(record: Record) -> None:
    assert encode(record).count(b"\n") == 1


def test_a_tail_torn_at_any_byte_of_the_last_record_is_left_out() -> None:
    whole = b"".join(encode(r) for r in RECORDS[:-1])
    last = encode(RECORDS[-1])
    for cut in range(len(last)):
        assert decode(whole + last[:cut]) == (RECORDS[:-1], len(whole)), cut


def test_a_last_record_with_zeros_instead_of_data_is_left_out() -> None:
    whole = b"".join(encode(r) for r in RECORDS[:-1])
    last = encode(RECORDS[-1])
    for cut in range(len(last)):
        assert decode(whole + last[:cut] + bytes(len(last) - cut)) == (RECORDS[:-1], len(whole))
        assert decode(whole + bytes(cut) + last[cut:])[1] in (len(whole), len(whole) + len(last))


def test_each_flipped_bit_of_a_record_is_noticed() -> None:
    line = encode(begin())[:-1]
    for at in range(len(line)):
        bad = bytearray(line)
        bad[at] ^= 0x01
        if bad[at : at + 1].lower() == line[at : at + 1].lower():
            continue
        with pytest.raises(InputError) as caught:
            decode_line(bytes(bad))
        assert caught.value.code == "bad-record"


@pytest.mark.parametrize("number", range(len(RECORDS) - 1))
def test_a_bad_record_before_the_last_makes_it_unreadable(number: int) -> None:
    lines = [encode(r) for r in RECORDS]
    lines[number] = lines[number].replace(b'"kind"', b'"kinf"')
    with pytest.raises(InputError) as caught:
        decode(b"".join(lines))
    assert caught.value.code == "bad-record"


def newer(record: Record) -> bytes:
    body = {**json.loads(encode(record)[9:]), "v": 2, "news": True}
    text = json.dumps(body).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_a_record_of_a_newer_schema_makes_it_unreadable_wherever_it_stands(number: int) -> None:
    """The last one too: it is whole, so it is not a torn tail to be cut off."""
    lines = [encode(r) for r in RECORDS]
    lines[number] = newer(RECORDS[number])
    with pytest.raises(InputError, match="schema 1, got 2"):
        decode(b"".join(lines))


@given(st.binary(max_size=200))
def test_no_bytes_make_it_raise_anything_else(data: bytes) -> None:
    try:
        records, used = decode(data)
    except InputError:
        return
    assert used <= len(data)
    assert b"".join(encode(r) for r in records).count(b"\n") == len(records)


@pytest.mark.parametrize("state", [s for s in State if s not in (State.REVERTING, State.REVERTED)])
def test_a_good_run_adds_up_to_its_state(state: State) -> None:
    progress = fold(upto(state))
    assert progress.state is state
    assert progress.finished is (state is State.CONFIRMED)
    assert progress.reason is None
    assert progress.begin == BEGIN


@pytest.mark.parametrize("state", [s for s in STEP if s not in (State.CONFIRMING, State.REVERTING)])
def test_a_failure_in_each_state_leads_to_reverting_with_its_reason(state: State) -> None:
    progress = fold([*upto(state), intent(STEP[state]), failed(STEP[state], "why")])
    assert progress.state is State.REVERTING
    assert progress.reason == Reason("why", "it is")


def test_the_first_failure_is_the_reason() -> None:
    records = [
        *upto(State.TRIAL),
        failed(Step.WATCH, "first"),
        failed(Step.REVERT, "second"),
        done(Step.REVERT),
    ]
    progress = fold(records)
    assert progress.state is State.REVERTED
    assert progress.reason is not None
    assert progress.reason.code == "first"


def test_data_of_outcomes_and_notes_is_kept_for_the_steps_that_follow() -> None:
    progress = fold([begin(), done(Step.STAGE, archive=1), note(None, before={"a": 1})])
    assert progress.data == {"archive": 1, "before": {"a": 1}}


@pytest.mark.parametrize(
    "records",
    [
        [],
        [intent(Step.STAGE)],
        [begin(), begin()],
        [begin(), intent(Step.VERIFY)],
        [begin(), done(Step.VERIFY)],
        [begin(), Record("outcome", AT, "stage", "perhaps")],
        [begin(), Record("dance", AT, "stage")],
        [begin(), Record("intent", AT, "dance")],
        [Record("begin", AT, data={"tx": "only"})],
        [*upto(State.CONFIRMED), intent(Step.CONFIRM)],
        [*upto(State.CONFIRMED), done(Step.CONFIRM)],
        [begin(), note(None, again="dance")],
    ],
)
def test_records_in_an_order_that_cannot_be_are_refused(records: list[Record]) -> None:
    with pytest.raises(InputError) as caught:
        fold(records)
    assert caught.value.code == "bad-journal"


def test_a_passing_fault_does_not_count_as_a_try() -> None:
    records = [begin()]
    for _ in range(20):
        records += [intent(Step.STAGE), note(Reason("server-busy", "later"), again="stage")]
    progress = fold(records)
    assert progress.tries == {Step.STAGE: 0}
    assert "again" not in progress.data
    assert fold([*records, intent(Step.STAGE)]).tries == {Step.STAGE: 1}


def test_a_begun_step_is_intended() -> None:
    progress = fold([begin(), intent(Step.STAGE)])
    assert progress.intended(Step.STAGE)
    assert not progress.intended(Step.VERIFY)


def test_the_timeline_shows_changes_of_state_and_reasons_in_between() -> None:
    changes = timeline(RECORDS)
    assert [c.state.value for c in changes] == [
        "offered", "staged", "verified", "rehearsed", "trial", "trial", "reverting",
    ]  # fmt: skip
    assert [c.number for c in changes] == [0, 2, 4, 6, 8, 9, 10]
    assert changes[-2].reason == Reason("trial-stretched", "the net")
    assert changes[-1].reason == Reason("bad", "it is")
    assert all(RECORDS[c.number].at == c.at for c in changes)


# --- fields of a newer release


def test_fields_that_a_newer_release_added_are_passed_over() -> None:
    """An older updater goes on with what a newer one began: after a revert it must."""
    line = encode(begin())
    body = json.loads(line[9:])
    body["more"] = {"deep": [1]}
    body["data"].update(priority=7, via="carrier")
    body["at"]["zone"] = "UTC"
    body["reason"] = {"code": "c", "text": "t", "hint": "h"}
    text = json.dumps(body).encode()
    record = decode_line(b"%08x %s" % (zlib.crc32(text), text))
    assert record.at == AT
    assert record.reason == Reason("c", "t")
    progress = fold([record, intent(Step.STAGE), done(Step.STAGE)])
    assert progress.state is State.STAGED
    assert (progress.begin.tx, progress.begin.via) == ("tx-1", "carrier")


def test_a_field_that_is_missing_is_no_newer_release() -> None:
    data = {name: value for name, value in asdict(BEGIN).items() if name != "origin"}
    with pytest.raises(InputError) as caught:
        fold([Record("begin", AT, data=data)])
    assert caught.value.code == "bad-journal"


def test_a_later_field_that_says_nothing_is_not_written() -> None:
    """Releases from before it was there take no unknown fields."""
    assert "via" not in BEGIN.as_data()
    assert fold([Record("begin", AT, data=BEGIN.as_data())]).begin == BEGIN
    native = replace(BEGIN, via="native")
    assert fold([Record("begin", AT, data=native.as_data())]).begin == native


def test_the_way_back_of_one_that_is_put_there_anew_is_the_one_before_it() -> None:
    assert (BEGIN.anew, BEGIN.way_back) == (False, BEGIN.origin)
    name = BEGIN.release.name
    anew = replace(BEGIN, origin=name, fallback="1.0.0-000000000000")
    assert (anew.anew, anew.way_back) == (True, "1.0.0-000000000000")
    assert replace(anew, fallback="").way_back == name
