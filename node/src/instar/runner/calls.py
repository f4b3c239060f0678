"""The host's functions of sdk/instar_module.h, on plain values: what the kinds native and wasm have in common.

`Calls` serves one module. `begin` comes before each call into it and `finish` after; in between the module
calls the rest, through `adapt` (runner/adapt.py). A function that cannot do what it was asked raises Wrong.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any, NoReturn

from instar.core.errors import InputError, InstarError
from instar.modules.context import Context
from instar.runner.builder import Builder
from instar.runner.reading import Reading
from instar.runner.wrong import ABSENT, BAD_VALUE, OK, REFUSED, Wrong

TOO_MUCH = "too-much-output"  # the code of runner/line.py
KINDS = ((type(None), 0), (bool, 1), (int, 2), (float, 3), (str, 4), (list, 5), (dict, 6))


class Calls:
    """What one module can ask of its runner. `begin` before each call into the module, `finish` after it."""

    def __init__(
        self,
        context: Context,
        read: tuple[str, ...],
        stateful: bool,
        give_up: Callable[[InstarError], NoReturn],
    ) -> None:
        """`give_up` leaves the module's code at once; `note` calls it for what must not go on."""
        self._context = context
        self._give_up = give_up
        self._stateful = stateful
        self._read = read
        self._reading: Reading | None = None
        self.begin({})

    def begin(self, asked: dict[str, Any]) -> None:
        self._args = asked
        self._reply = Builder()
        self._failed = ""
        self._mistake: BaseException | None = None

    def note(self, mistake: BaseException) -> None:
        """Keep the first one. A module that says too much does not come back from here."""
        self._mistake = self._mistake or mistake
        if isinstance(mistake, InstarError) and mistake.code == TOO_MUCH:
            self._give_up(mistake)

    def raise_mistake(self) -> None:
        if self._mistake is not None:
            raise self._mistake

    def finish(self, returned: int, what: str) -> dict[str, Any]:
        """The reply. Raises what was noted, or InstarError `module-failed`, `bad-reply`."""
        self.raise_mistake()
        if returned != OK or self._failed:
            why = self._failed or f"cannot {what}: expected the module to return 0, got {returned}"
            raise InstarError("module-failed", why)
        return self._reply.finish()

    # --- the arguments

    def args(self) -> bytes:
        return _json(self._args)

    def kind(self, key: bytes) -> int:
        value = self._find(key)
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            return 3
        return next(number for kind, number in KINDS if isinstance(value, kind))

    def count(self, key: bytes) -> int:
        value = self._find(key)
        if not isinstance(value, list | dict):
            raise Wrong(ABSENT)
        return len(value)

    def get_text(self, key: bytes) -> bytes:
        value = self._find(key)
        if value is None:
            raise Wrong(ABSENT)
        if isinstance(value, list | dict):
            return _json(value)
        if not isinstance(value, str):
            raise _not_a(key, "a text", value)
        return value.encode("utf-8", "replace")

    def get_int(self, key: bytes, otherwise: int) -> int:
        value = self._find(key)
        if value is None:
            return otherwise
        if not isinstance(value, int) or isinstance(value, bool) or not -(1 << 63) <= value < 1 << 63:
            raise _not_a(key, "a whole number of 64 bits", value)
        return value

    def get_double(self, key: bytes, otherwise: float) -> float:
        value = self._find(key)
        if value is None:
            return otherwise
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise _not_a(key, "a number", value)
        try:
            return float(value)
        except OverflowError as error:
            raise _not_a(key, "a number of 64 bits", value) from error

    def get_bool(self, key: bytes, otherwise: int) -> int:
        value = self._find(key)
        if value is None:
            return otherwise
        if not isinstance(value, bool):
            raise _not_a(key, "true or false", value)
        return int(value)

    def _find(self, key: bytes) -> Any:
        """An argument by its key or JSON pointer. Raises Wrong ABSENT."""
        name = _text(key)
        parts = [part.replace("~1", "/").replace("~0", "~") for part in name[1:].split("/")]
        value: Any = self._args
        for part in parts if name.startswith("/") else [name]:
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isascii() and part.isdigit() and int(part[:9]) < len(value):
                value = value[int(part[:9])]
            else:
                raise Wrong(ABSENT)
        return value

    # --- the reply

    def text(self, text: bytes) -> None:
        self._reply.text(_text(text))

    def key(self, key: bytes) -> None:
        self._reply.key(_text(key))

    def begin_object(self) -> None:
        self._reply.begin({})

    def end_object(self) -> None:
        self._reply.end(dict)

    def begin_list(self) -> None:
        self._reply.begin([])

    def end_list(self) -> None:
        self._reply.end(list)

    def put_string(self, text: bytes) -> None:
        self._reply.put(_text(text), len(text))

    def put_int(self, value: int) -> None:
        self._reply.put(value)

    def put_double(self, value: float) -> None:
        if not math.isfinite(value):
            raise Wrong(BAD_VALUE, "bad-reply", f"cannot use reply: expected a finite number, got {value}")
        self._reply.put(value)

    def put_bool(self, value: int) -> None:
        self._reply.put(bool(value))

    def put_null(self) -> None:
        self._reply.put(None)

    def put_json(self, text: bytes) -> None:
        self._reply.put(_parse(text, "bad-reply", "cannot use reply"), len(text))

    def fail(self, text: bytes) -> None:
        self._failed = (
            self._failed or _text(text)[:2_000] or "cannot run module: it failed and did not say why"
        )

    # --- while it runs

    def progress(self, fraction: float, text: bytes) -> None:
        self._context.progress(fraction, _text(text))

    def log(self, text: bytes) -> None:
        self._context.log(_text(text))

    # --- state, files, time

    def load(self) -> bytes:
        if not self._stateful:
            raise Wrong(REFUSED)
        state = self._context.load()
        if state is None:
            raise Wrong(ABSENT)
        return _json(state)

    def save(self, text: bytes) -> None:
        if not self._stateful:
            raise Wrong(REFUSED)
        state = _parse(text, "bad-state", "cannot save state")
        if not isinstance(state, dict):
            kind = type(state).__name__
            raise Wrong(BAD_VALUE, "bad-state", f"cannot save state: expected an object, got {kind}")
        self._context.save(state)

    def data(self) -> bytes:
        return str(self._context.data).encode("utf-8", "surrogateescape")

    def file_read(self, path: bytes, offset: int, room: int) -> bytes:
        return self._reader().read(path, offset, room)

    def file_list(self, path: bytes) -> bytes:
        return _json(self._reader().list(path))

    def _reader(self) -> Reading:
        if self._reading is None:
            try:
                allowed = (*self._read, str(self._context.data))
            except InputError:  # this run has no data folder
                allowed = self._read
            self._reading = Reading(allowed)
        return self._reading

    def now(self) -> float:
        return time.time()


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _parse(raw: bytes, code: str, what: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        return json.loads(_text(raw), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Wrong(BAD_VALUE, code, f"{what}: expected JSON, got {_text(raw[:40])!a}") from error


def _not_a(key: bytes, wanted: str, value: Any) -> Wrong:
    got = _text(_json(value)[:40])
    return Wrong(
        BAD_VALUE, "bad-job", f"cannot read argument {_text(key)!a:.80}: expected {wanted}, got {got!a}"
    )
