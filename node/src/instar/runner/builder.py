"""A reply that comes in pieces: begin, key, value, end. Whatever order they come in, it is JSON or an error."""

from __future__ import annotations

from typing import Any

from instar.core.errors import InstarError
from instar.runner.reply import MAX_DEPTH, MOST_REPLY
from instar.runner.wrong import BAD_ORDER, TOO_LARGE, Wrong

EACH = 2  # bytes that a value needs at least, with its comma


class Builder:
    """An object is open from the beginning. Its member `text` is what `text` was given, put together.

    The bounds here keep a module from filling the host's memory; the runner looks at the whole once more.
    """

    def __init__(self) -> None:
        self._open: list[dict[str, Any] | list[Any]] = [{}]
        self._key: str | None = None
        self._texts: list[str] = []
        self._size = 0

    def key(self, key: str) -> None:
        if isinstance(self._open[-1], list):
            raise _order("a value of the list", f"the key {key!a:.40}")
        if self._key is not None:
            raise _order(f"a value for the key {self._key!a:.40}", f"the key {key!a:.40}")
        self._grow(len(key))
        self._key = key

    def put(self, value: Any, size: int = 0) -> None:
        """A value, of about `size` bytes as JSON."""
        inner = self._open[-1]
        if isinstance(inner, dict) and self._key is None:
            raise _order("a key", "a value")
        self._grow(size)
        if isinstance(inner, list):
            inner.append(value)
        else:
            inner[self._key or ""] = value
            self._key = None

    def begin(self, empty: dict[str, Any] | list[Any]) -> None:
        if len(self._open) >= MAX_DEPTH:
            text = f"cannot use reply: expected at most {MAX_DEPTH} levels, got more"
            raise Wrong(TOO_LARGE, "bad-reply", text)
        self.put(empty)
        self._open.append(empty)

    def end(self, kind: type) -> None:
        inner = self._open[-1]
        if len(self._open) == 1:
            raise _order("a begin before it", f"the end of {_name(kind())}")
        if not isinstance(inner, kind):
            raise _order(f"the end of {_name(inner)}", f"the end of {_name(kind())}")
        if self._key is not None:
            raise _order(f"a value for the key {self._key!a:.40}", "the end of the object")
        self._open.pop()

    def text(self, text: str) -> None:
        self._grow(len(text))
        self._texts.append(text)

    def finish(self) -> dict[str, Any]:
        """The whole. Raises InstarError `bad-reply` while something is open."""
        top = self._open[0]
        if len(self._open) > 1 or self._key is not None or not isinstance(top, dict):
            what = f"a value for the key {self._key!a:.40}" if self._key is not None else _end(self._open[-1])
            raise InstarError("bad-reply", f"cannot use reply: expected {what}, got the end of the call")
        if self._texts:
            top["text"] = "".join(self._texts)
        return top

    def _grow(self, size: int) -> None:
        self._size += size + EACH
        if self._size > MOST_REPLY:
            text = f"cannot use reply: expected at most {MOST_REPLY} bytes, got more"
            raise Wrong(TOO_LARGE, "bad-reply", text)


def _order(expected: str, got: str) -> Wrong:
    return Wrong(BAD_ORDER, "bad-reply", f"cannot use reply: expected {expected}, got {got}")


def _name(value: object) -> str:
    return "a list" if isinstance(value, list) else "an object"


def _end(value: object) -> str:
    return f"the end of {_name(value)}"
