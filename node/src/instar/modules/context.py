"""What a module is handed: who it is, what was asked, and ways to talk, to keep state and to build a reply.

The same object serves the three kinds; what writes a line is given by the runner.
Import diet: what only some modules need is imported when it is called.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from instar.core.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

STATE = "state.json"
MOST_STATE = 16 << 20  # bytes
MOST_TEXT = 8_192  # characters of one log line or of one progress text

Emit = Callable[[dict[str, Any]], None]


class Context:
    """`data` is the module's own folder, the only place where it may keep files; `args` is what was asked."""

    def __init__(
        self,
        name: str,
        version: str,
        emit: Emit,
        program: str,
        data: str = "",
        args: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.version = version
        self.args: dict[str, Any] = args or {}
        self._emit = emit
        self._program = program
        self._data = data
        self._built: dict[str, Any] = {}
        self._texts: list[str] = []

    @property
    def data(self) -> Path:
        """The module's data folder. Raises InputError `no-data` for a run that has none."""
        if not self._data:
            raise InputError(
                "no-data", f"cannot use the data folder: module {self.name} has none in this run"
            )
        from pathlib import Path

        return Path(self._data)

    # --- talking while it runs

    def log(self, text: str) -> None:
        """One line for the operator who waits, and for the node's log. Raises InstarError `too-much-output`."""
        self._emit({"log": str(text)[:MOST_TEXT]})

    def progress(self, fraction: float, text: str = "") -> None:
        """How much of the whole is done, 0 to 1; -1: not told."""
        part = float(fraction)
        part = min(part, 1.0) if part >= 0 else -1.0  # what is no number counts as not told
        self._emit({"progress": part, "text": str(text)[:MOST_TEXT]})

    # --- state that outlives the process

    def load(self) -> dict[str, Any] | None:
        """What was saved last; None when nothing was, or when it cannot be read (it is then set aside)."""
        raw = self.load_bytes()
        if raw is None:
            return None
        try:
            state = json.loads(raw)
            if isinstance(state, dict):
                return state
        except (ValueError, RecursionError):
            pass
        with contextlib.suppress(OSError):
            os.replace(self.data / STATE, self.data / f"{STATE}.unreadable")
        self.log("the saved state could not be read; it was set aside")
        return None

    def save(self, state: dict[str, Any]) -> None:
        """Keep `state`: after a power cut the old one or the new one is there, whole.

        Raises InputError `bad-state` for what JSON cannot say, MachineError `disk-full`, `disk-failed`.
        """
        try:
            raw = json.dumps(state, allow_nan=False).encode()
            if raw[:1] != b"{":
                raise TypeError(f"no object but {type(state).__name__}")
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(
                "bad-state", f"cannot save state: expected an object of JSON values, got {error!s:.80}"
            ) from error
        self.save_bytes(raw)

    def load_bytes(self) -> bytes | None:
        """The bytes of the saved state, unread; None when there are none."""
        if not self._data:
            return None
        try:
            with open(f"{self._data}/{STATE}", "rb") as file:
                return file.read(min(os.fstat(file.fileno()).st_size, MOST_STATE) + 1)
        except FileNotFoundError:
            return None

    def save_bytes(self, raw: bytes) -> None:
        """As `save`, for a kind that has its state as text."""
        from instar.host.files import write_atomic

        if len(raw) > MOST_STATE:
            raise InputError(
                "bad-state", f"cannot save state: expected at most {MOST_STATE} bytes, got {len(raw)}"
            )
        write_atomic(self.data / STATE, raw, 0o600)

    # --- a reply in pieces

    def text(self, text: str) -> None:
        """Add to the reply's `text`."""
        self._texts.append(str(text))

    def put(self, key: str, value: Any) -> None:
        """Set one field of the reply."""
        self._built[str(key)] = value

    def take_built(self) -> dict[str, Any]:
        """What `text` and `put` made since the last time. The runner's call."""
        built, texts = self._built, self._texts
        self._built, self._texts = {}, []
        if texts:
            built["text"] = "".join(texts)
        return built

    # --- the program that runs this

    def digest(self) -> str:
        """The program digest, computed now from the file. Raises OSError or InputError."""
        from instar.trust.program import program_digest

        with open(self._program, "rb") as file:
            return program_digest(file.read())
