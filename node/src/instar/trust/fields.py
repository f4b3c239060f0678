"""Strict reading of JSON objects: a missing or wrongly typed field is an error that names it.

Fields that nobody asks for are ignored, so that a newer writer's object still reads.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from instar.core.errors import InputError

V = TypeVar("V")


class Fields:
    """One decoded object. `what` names it in errors; `code` is their code."""

    def __init__(self, value: object, what: str, code: str) -> None:
        if not isinstance(value, dict):
            raise InputError(code, f"cannot read {what}: expected an object, got {_kind(value)}")
        self._value: dict[str, Any] = value
        self._what = what
        self._code = code

    @classmethod
    def decode(cls, data: bytes, what: str, code: str) -> Fields:
        """The object in the JSON text `data`; a name that stands twice is refused."""
        try:
            value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
        except (ValueError, RecursionError) as error:
            raise InputError(code, f"cannot read {what}: {error}") from error
        return cls(value, what, code)

    def get(self, name: str, kind: type[V]) -> V:
        """The field `name`, which must be of exactly the type `kind` (a bool is no int)."""
        if name not in self._value:
            raise self.error(f"the field {name!r} is missing")
        value = self._value[name]
        if type(value) is not kind:
            raise self.error(f"expected {name!r} to be {kind.__name__}, got {_kind(value)}")
        return value

    def optional(self, name: str, default: V) -> V:
        """The field `name`, of the type of `default`, which stands where it is missing."""
        return self.get(name, type(default)) if name in self._value else default

    def number(self, name: str, default: float) -> float:
        """The field `name`: a whole or a broken number."""
        value = self._value.get(name, default)
        if type(value) not in (int, float):
            raise self.error(f"expected {name!r} to be a number, got {_kind(value)}")
        return float(value)

    def hexadecimal(self, name: str, length: int) -> str:
        """The field `name`: `length` lower-case hexadecimal digits."""
        value = self.get(name, str)
        if len(value) != length or not set(value) <= set("0123456789abcdef"):
            raise self.error(f"expected {name!r} to be {length} hexadecimal digits, got {value[:80]!r}")
        return value

    def error(self, reason: str) -> InputError:
        return InputError(self._code, f"cannot read {self._what}: {reason}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} stands twice")
    return value


def _constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
