"""Pointers and lengths put before `Calls`: its functions as a module's code calls them.

`FUNCTIONS` is the table of sdk/instar_module.h: order, arguments, results; a test holds the two together.
Nothing that a module passes raises out of an adapted function: a call that cannot be done returns a negative
number, and what was a mistake is noted, for `Calls.finish` to raise.

    adapt(calls, memory)["put_int"](7) == OK
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from instar.runner.calls import Calls
from instar.runner.wrong import FAILED, OK, QUIET, TOO_LARGE, Wrong

MOST_IN = 4 << 20  # bytes of one text that a module passes
MOST_OUT = 16 << 20  # bytes of room that is made use of


class Function(NamedTuple):
    """`takes`: T text in, O text out with a NUL, B bytes out, L int64, I int32, D double; `gives`: I, L or D.

    The last argument of one that `has_default` is what it returns when there is nothing to return.
    """

    name: str
    takes: str = ""
    gives: str = "I"
    has_default: bool = False


FUNCTIONS = (
    Function("args", "O"), Function("kind", "T"), Function("count", "T"), Function("get_text", "TO"),
    Function("get_int", "TL", "L", True), Function("get_double", "TD", "D", True),
    Function("get_bool", "TI", "I", True), Function("text", "T"), Function("key", "T"),
    Function("begin_object"), Function("end_object"), Function("begin_list"), Function("end_list"),
    Function("put_string", "T"), Function("put_int", "L"), Function("put_double", "D"),
    Function("put_bool", "I"), Function("put_null"), Function("put_json", "T"), Function("fail", "T"),
    Function("progress", "DT"), Function("log", "T"), Function("load", "O"), Function("save", "T"),
    Function("data", "O"), Function("file_read", "TLB", "L"), Function("file_list", "TO"),
    Function("now", "", "D"),
)  # fmt: skip


class Memory(Protocol):
    """The module's memory. Both raise Wrong BAD_POINTER for what is not in it."""

    def read(self, at: int, length: int) -> bytes: ...

    def write(self, at: int, data: bytes) -> None: ...


def adapt(calls: Calls, memory: Memory) -> dict[str, Callable[..., Any]]:
    """Each function of the table as the module calls it: pointers, lengths and numbers, `self` left out."""
    return {function.name: _adapt(calls, memory, function) for function in FUNCTIONS}


def _adapt(calls: Calls, memory: Memory, function: Function) -> Callable[..., Any]:
    method = getattr(calls, function.name)
    out = function.takes[-1:] if function.takes[-1:] in ("O", "B") else ""
    none: Any = math.nan if function.gives == "D" else FAILED

    def call(*raw: Any) -> Any:
        number = none
        try:
            given = method(*_values(memory, function.takes, raw))
            if out:
                return _write(memory, raw[-2], raw[-1], given, out == "O")
            return OK if given is None else given
        except Wrong as wrong:
            number = wrong.number
            if number not in QUIET:
                calls.note(wrong.error(function.name))
            elif out == "O":
                _write_nothing(calls, memory, raw[-2], raw[-1])
        except BaseException as error:  # noqa: BLE001 - nothing may unwind through the module's own frames
            calls.note(error)
        return raw[-1] if function.has_default else number

    return call


def _values(memory: Memory, takes: str, raw: tuple[Any, ...]) -> list[Any]:
    """What the method wants: a text for each T, how much room for B."""
    values: list[Any] = []
    at = 0
    for kind in takes:
        if kind == "T":
            values.append(_read(memory, raw[at], raw[at + 1]))
        elif kind == "B":
            values.append(min(raw[at + 1], MOST_OUT))
        elif kind != "O":
            values.append(raw[at])
        at += 2 if kind in "TOB" else 1
    return values


def _read(memory: Memory, at: int, length: int) -> bytes:
    if length > MOST_IN:
        text = f"cannot read a text: expected at most {MOST_IN} bytes, got {length}"
        raise Wrong(TOO_LARGE, "module-failed", text)
    return memory.read(at, length) if length else b""


def _write(memory: Memory, at: int, room: int, data: bytes, text: bool) -> int:
    """Returns the whole length, also of what did not fit."""
    if text and room:
        memory.write(at, _cut(data, min(room - 1, MOST_OUT)) + b"\0")
    elif not text and data:
        memory.write(at, data)
    return len(data)


def _cut(data: bytes, most: int) -> bytes:
    """At most `most` bytes, and no half character at the end."""
    if len(data) <= most:
        return data
    while most and data[most] & 0xC0 == 0x80:
        most -= 1
    return data[:most]


def _write_nothing(calls: Calls, memory: Memory, at: int, room: int) -> None:
    """What is absent reads as "", so that a module that does not look at the result reads no old bytes."""
    try:
        _write(memory, at, room, b"", True)
    except Wrong as wrong:
        calls.note(wrong.error("text out"))
