"""core.light: the same as the standard library's data classes, in all that we use of them."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.core import light
from instar.wire.messages import BY_TYPE


@light.dataclass(frozen=True, slots=True)
class Light:
    """One of ours."""

    T: ClassVar[str] = "t"
    a: int
    b: str = "b"
    c: list[int] = light.field(default_factory=list)

    def twice(self) -> int:
        return 2 * self.a


@dataclasses.dataclass(frozen=True, slots=True)
class Standard:
    """One of theirs."""

    T: ClassVar[str] = "t"
    a: int
    b: str = "b"
    c: list[int] = dataclasses.field(default_factory=list)


@light.dataclass(frozen=True, slots=True)
class Below(Light):
    @property
    def name(self) -> str:
        return f"{self.b}{self.a}"


@light.dataclass(slots=True)
class Open:
    a: int
    inner: Light | None = None

    def __post_init__(self) -> None:
        if self.a < 0:
            raise ValueError("a")


calls = st.tuples(
    st.lists(st.one_of(st.integers(), st.text(max_size=3)), max_size=4),
    st.dictionaries(st.sampled_from(["a", "b", "c", "d", "T"]), st.integers(), max_size=3),
)


def outcome(make: Callable[..., Any], given_: list[Any], named: dict[str, Any]) -> Any:
    try:
        return dataclasses.asdict(make(*given_, **named))
    except TypeError:
        return TypeError


@given(calls)
def test_it_is_made_as_a_standard_one_is(call: tuple[list[Any], dict[str, Any]]) -> None:
    given_, named = call
    assert outcome(Light, given_, named) == outcome(Standard, given_, named)


def test_it_shows_itself_as_a_standard_one_does() -> None:
    assert repr(Light(1)) == repr(Standard(1)).replace("Standard", "Light")


def test_equal_by_fields_and_class() -> None:
    assert Light(1) == Light(1, "b", [])
    assert Light(1) != Light(2)
    assert Light(1) != Below(1)
    assert Light(1) != Standard(1)
    assert hash(Light(1, c=())) == hash(Light(1, c=()))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        hash(Open(1))


def test_defaults_are_made_anew() -> None:
    assert Light(1).c is not Light(1).c
    assert Light.T == "t"


def test_frozen_ones_do_not_change_and_none_takes_new_names() -> None:
    one, other = Light(1), Open(1)
    for change in (lambda: setattr(one, "a", 2), lambda: setattr(one, "z", 2), lambda: delattr(one, "a")):
        with pytest.raises(AttributeError):
            change()
    other.a = 3
    assert other == Open(3)
    with pytest.raises(AttributeError):
        other.z = 2  # type: ignore[attr-defined]
    assert not hasattr(one, "__dict__")


def test_a_class_below_has_its_fields_and_its_own() -> None:
    assert Below(3, "x").name == "x3"
    assert Below(3).twice() == 6
    assert not hasattr(Below(3), "__dict__")


def test_a_check_of_its_own_is_made() -> None:
    with pytest.raises(ValueError, match="a"):
        Open(-1)


@pytest.mark.parametrize("of", [light, dataclasses])
def test_the_functions_of_both_take_it(of: Any) -> None:
    assert of.replace(Light(1), b="x") == Light(1, "x")
    assert of.asdict(Open(1, Light(2))) == {"a": 1, "inner": {"a": 2, "b": "b", "c": []}}
    with pytest.raises(TypeError):
        of.replace(Light(1), z=1)


def test_what_dataclasses_says_of_it() -> None:
    ours, theirs = dataclasses.fields(Light), dataclasses.fields(Standard)
    assert [(f.name, f.type, f.default, f.default_factory) for f in ours] == [
        (f.name, f.type, f.default, f.default_factory) for f in theirs
    ]
    assert [f.name for f in dataclasses.fields(Below(1))] == ["a", "b", "c"]
    assert light.needs(Light) == {"a": True, "b": False, "c": False}


def test_it_is_copied_and_pickled() -> None:
    one = Open(1, Light(2, c=[3]))
    for again in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert again == one
    assert copy.deepcopy(one).inner is not one.inner


def test_it_is_matched_by_place() -> None:
    match Light(1, "x"):
        case Light(a, b):
            assert (a, b) == (1, "x")


def test_every_message_knows_its_fields() -> None:
    for cls in BY_TYPE.values():
        assert list(light.needs(cls)) == [part.name for part in dataclasses.fields(cls)]
