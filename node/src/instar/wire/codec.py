"""Frames of the control channel ↔ messages. Bytes in, one message or an InputError out.

The order that must hold in `decode`: size, JSON, object, type, fields; so a frame that is too
large is never parsed, and an error names the first thing that is wrong.

>>> decode(encode(Ack("j-1")))
Ack(id='j-1')

Codes: `frame-too-large`, `not-json`, `duplicate-key`, `too-deep`, `not-text`, `not-an-object`,
`missing-type`, `unknown-type`, `missing-field`, `wrong-type`. Fields that nobody knows are ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from instar.core.errors import InputError
from instar.core.light import needs
from instar.wire.messages import BY_TYPE, MAX_FRAME, Message

MAX_DEPTH = 32  # of lists and objects within a frame
WHOLE_NUMBER_BOUND = 2**63  # what every peer's integers can hold
SHOWN = 60  # characters of a peer's value in an error


class _RefusedError(Exception):
    """Carries an InputError through the json module, which would take a ValueError for its own."""

    def __init__(self, error: InputError) -> None:
        self.error = error


def encode(message: Message) -> str:
    """The frame for `message`: compact JSON. Raises InputError when the peer could not read it."""
    body: dict[str, Any] = {"t": message.T}
    for name, *_ in _FIELDS[type(message)]:
        body[name] = getattr(message, name)
    try:
        frame = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        size = len(frame.encode())
    except RecursionError as error:
        raise _cannot("write", "too-deep", f"at most {MAX_DEPTH} levels", "more") from error
    except (TypeError, ValueError) as error:
        raise _cannot("write", "not-json", "values that JSON has", str(error)) from error
    if size > MAX_FRAME:
        raise _cannot("write", "frame-too-large", f"at most {MAX_FRAME} bytes", f"{size}")
    return frame


def decode(frame: bytes | str) -> Message:
    """The message in `frame`. Raises InputError, and nothing else, when there is none."""
    body = _parse(frame)
    if "t" not in body:
        raise _cannot("read", "missing-type", "a field 't'", "none")
    kind = body["t"]
    cls = BY_TYPE.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise _cannot("read", "unknown-type", f"'t' of {', '.join(BY_TYPE)}", _show(kind))
    values: dict[str, Any] = {}
    for name, wanted, check, required in _FIELDS[cls]:
        if name not in body:
            if required:
                raise _cannot("read", "missing-field", f"a field '{name}' in '{cls.T}'", "none")
            continue
        try:
            values[name] = check(body[name])
        except (TypeError, OverflowError) as error:
            where = f"'{name}' of '{cls.T}' to be {wanted}"
            raise _cannot("read", "wrong-type", where, _show(body[name])) from error
    return cls(**values)


def _parse(frame: bytes | str) -> dict[str, Any]:
    try:
        raw = frame.encode() if isinstance(frame, str) else frame
        if len(raw) > MAX_FRAME:
            raise _cannot("read", "frame-too-large", f"at most {MAX_FRAME} bytes", f"{len(raw)}")
        body = json.loads(
            raw.decode(), object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite
        )
    except _RefusedError as refusal:
        raise refusal.error from None
    except RecursionError as error:
        raise _cannot("read", "too-deep", f"at most {MAX_DEPTH} levels", "more") from error
    except ValueError as error:  # JSON, UTF-8, or a number with thousands of digits
        raise _cannot("read", "not-json", "JSON in UTF-8", str(error)[:SHOWN]) from error
    if not isinstance(body, dict):
        raise _cannot("read", "not-an-object", "a JSON object", _show(body))
    _inspect(body, MAX_DEPTH)
    return body


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RefusedError(_cannot("read", "duplicate-key", "each key once", _show(twice)))
    return made


def _constant(word: str) -> Any:
    raise _RefusedError(_cannot("read", "not-json", "finite numbers", word))


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _RefusedError(_cannot("read", "not-json", "finite numbers", digits[:SHOWN]))
    return value


def _inspect(value: object, depth: int) -> None:
    """Refuse what JSON allows and a receiver would stumble over later: depth, half characters."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _cannot("read", "not-text", "whole Unicode characters", _show(value)) from error
    elif isinstance(value, (dict, list)):
        if depth == 0:
            raise _cannot("read", "too-deep", f"at most {MAX_DEPTH} levels", "more")
        for part in value:
            _inspect(part, depth - 1)
        if isinstance(value, dict):
            for part in value.values():
                _inspect(part, depth - 1)


def _cannot(verb: str, code: str, expected: str, got: str) -> InputError:
    return InputError(code, f"cannot {verb} frame: expected {expected}, got {got}")


def _show(value: object) -> str:
    """A peer's value, for an error: short, and in ASCII so that no terminal or log obeys it."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= WHOLE_NUMBER_BOUND:
        return "a number beyond 64 bits"
    text = ascii(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    raise TypeError


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    if not -WHOLE_NUMBER_BOUND <= value < WHOLE_NUMBER_BOUND:
        raise OverflowError
    return value


def _number(value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise TypeError


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise TypeError


def _texts(value: object) -> list[str]:
    if isinstance(value, list):
        return [_text(part) for part in value]
    raise TypeError


def _text_map(value: object) -> dict[str, str]:
    if isinstance(value, dict):
        return {name: _text(part) for name, part in value.items()}
    raise TypeError


def _map(value: object) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise TypeError


_CHECKS: dict[str, tuple[str, Callable[[object], Any]]] = {
    "str": ("text", _text),
    "int": ("a whole number", _whole),
    "float": ("a number", _number),
    "bool": ("true or false", _flag),
    "list[str]": ("a list of texts", _texts),
    "dict[str, str]": ("an object of texts", _text_map),
    "dict[str, Any]": ("an object", _map),
}


def _fields_of(cls: type[Message]) -> list[tuple[str, str, Callable[[object], Any], bool]]:
    """(name, what is wanted, check, required) of each field. KeyError: a kind this decoder lacks."""
    return [(name, *_CHECKS[cls.__annotations__[name]], needed) for name, needed in needs(cls).items()]


_FIELDS = {cls: _fields_of(cls) for cls in BY_TYPE.values()}
