"""Frames ↔ messages: what goes in comes out, and nothing that comes in does harm."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instar.core.errors import InputError
from instar.wire.codec import MAX_DEPTH, decode, encode
from instar.wire.messages import BY_TYPE, MAX_FRAME, Ack, Health, Job, Message, Ping, Result

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json"))
MUTATIONS = 1_000

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
finite = st.floats(allow_nan=False, allow_infinity=False)
whole = st.integers(-(2**63), 2**63 - 1)
values = st.recursive(
    st.none() | st.booleans() | whole | finite | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
BY_KIND: dict[str, st.SearchStrategy[Any]] = {
    "str": texts,
    "int": whole,
    "float": finite,
    "bool": st.booleans(),
    "list[str]": st.lists(texts, max_size=4),
    "dict[str, str]": st.dictionaries(texts, texts, max_size=4),
    "dict[str, Any]": st.dictionaries(texts, values, max_size=4),
}


def messages(cls: type[Message]) -> st.SearchStrategy[Message]:
    return st.builds(cls, **{part.name: BY_KIND[str(part.type)] for part in fields(cls)})


@pytest.mark.parametrize("cls", BY_TYPE.values(), ids=list(BY_TYPE))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_round_trip(cls: type[Message], data: st.DataObject) -> None:
    message = data.draw(messages(cls))
    assert decode(encode(message)) == message
    assert decode(encode(message).encode()) == message


def recorded_type(path: Path) -> str:
    """The file's name is a type, and words after it."""
    stem = f"{path.stem}-"
    return max((name for name in BY_TYPE if stem.startswith(f"{name}-")), key=len)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_frames_decode_for_ever(path: Path) -> None:
    raw = path.read_bytes()
    message = decode(raw)
    assert recorded_type(path) == message.T
    again = json.loads(encode(message))
    for name, value in json.loads(raw).items():
        if name in again:
            assert again[name] == value


def test_every_type_is_recorded() -> None:
    assert {recorded_type(path) for path in RECORDED} == set(BY_TYPE)


def mutate(frame: str, chance: random.Random) -> bytes:
    """One of: bytes changed, cut, doubled; a field dropped, replaced or added."""
    kind = chance.randrange(6)
    raw = bytearray(frame.encode())
    if kind == 0:
        for _ in range(chance.randint(1, 8)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
    elif kind == 1:
        del raw[chance.randrange(len(raw)) :]
    elif kind == 2:
        at = chance.randrange(len(raw))
        raw[at:at] = raw[at : at + chance.randint(1, 20)]
    else:
        body = json.loads(frame)
        name = chance.choice(sorted(body))
        strange = [None, True, -1, 2**70, 1.5, "", "\ud800", [], [1], {}, {"a": [{}]}, 10**400]
        if kind == 3:
            del body[name]
        elif kind == 4:
            body[name] = chance.choice(strange)
        else:
            body[chance.choice(["t", "x", name * 2])] = chance.choice(strange)
        raw = bytearray(json.dumps(body).encode())
    return bytes(raw)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_mutations_decode_or_are_refused(path: Path) -> None:
    chance = random.Random(path.stem)
    refused: list[str] = []
    for _ in range(MUTATIONS):
        frame = mutate(path.read_text().strip(), chance)
        try:
            assert isinstance(decode(frame), Message)
        except InputError as error:
            refused.append(error.text)
    assert 0 < len(refused) < MUTATIONS
    assert all(text.startswith("cannot read frame: expected ") and text.isprintable() for text in refused)


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"", "not-json"),
        (b"\xff", "not-json"),
        (b'{"t":"ping","n":NaN}', "not-json"),
        (b'{"t":"welcome","v":1,"server":"","ping_s":1e999,"health_s":1}', "not-json"),
        (b'{"t":"ping","n":' + b"9" * 5000 + b"}", "not-json"),
        (b"[]", "not-an-object"),
        (b"7", "not-an-object"),
        (b"{}", "missing-type"),
        (b'{"t":7}', "unknown-type"),
        (b'{"t":["ping"]}', "unknown-type"),
        (b'{"t":"ack"}', "missing-field"),
        (b'{"t":"ack","id":null}', "wrong-type"),
        (b'{"t":"ping","n":true}', "wrong-type"),
        (b'{"t":"ping","n":1.0}', "wrong-type"),
        (b'{"t":"ping","n":9223372036854775808}', "wrong-type"),
        (b'{"t":"job","id":"a","module":"b","deadline_s":true}', "wrong-type"),
        (b'{"t":"job","id":"a","module":"b","deadline_s":1' + b"0" * 400 + b"}", "wrong-type"),
        (b'{"t":"health","ok":1}', "wrong-type"),
        (b'{"t":"health","ok":true,"modules":{"a":1}}', "wrong-type"),
        (b'{"t":"ping","n":1,"n":2}', "duplicate-key"),
        (b'{"t":"ack","id":"\\ud800"}', "not-text"),
        (b'{"t":"job","id":"a","module":"b","args":' + b'{"a":' * 40 + b"1" + b"}" * 41, "too-deep"),
        (b'{"t":"job","id":"a","module":"b","args":' + b'{"a":' * 20_000 + b"1" + b"}" * 20_001, "too-deep"),
        (b'{"t":"look","reason":"' + b"x" * MAX_FRAME + b'"}', "frame-too-large"),
    ],
)
def test_refusals_have_stable_codes(frame: bytes, code: str) -> None:
    with pytest.raises(InputError) as caught:
        decode(frame)
    assert caught.value.code == code


def test_whole_numbers_are_good_numbers() -> None:
    job = decode('{"t":"job","id":"a","module":"b","deadline_s":7}')
    assert isinstance(job, Job)
    assert isinstance(job.deadline_s, float)


def nested(depth: int) -> dict[str, Any]:
    body: dict[str, Any] = {}
    for _ in range(depth):
        body = {"a": body}
    return body


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: Result("a", True, stderr="x" * MAX_FRAME), "frame-too-large"),
        (lambda: Health(True, facts={"load": float("nan")}), "not-json"),
        (lambda: Health(True, facts={"when": object()}), "not-json"),
        (lambda: Health(True, facts=nested(100_000)), "too-deep"),
        (lambda: Ack("\ud800"), "not-json"),
    ],
)
def test_what_a_peer_could_not_read_is_not_written(make: Callable[[], Message], code: str) -> None:
    with pytest.raises(InputError) as caught:
        encode(make())
    assert caught.value.code == code


def test_optional_fields_have_defaults() -> None:
    assert decode('{"t":"ping"}') == Ping(0)
    required = [
        part.name for part in fields(Job) if part.default is MISSING and part.default_factory is MISSING
    ]
    assert required == ["id", "module"]


def test_depth_up_to_the_bound_is_read() -> None:
    frame = encode(Job("a", "b", args=nested(MAX_DEPTH - 3)))
    assert isinstance(decode(frame), Job)
